# SPDX-License-Identifier: Apache-2.0
"""What [`SageTrainer`] checks of its arguments and data before anything is computed or changed."""

import dataclasses
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from .arguments import SageTrainingArguments
from .classifier import SageClassifier
from .validation import check_integer


LOSS_ARGUMENTS = ("tau", "compensation", "text_prior", "text_guidance", "absent")


def check_arguments(
    model: nn.Module,
    args: SageTrainingArguments,
    peft_config: PeftConfig | None,
    compute_loss_func: Any,
) -> None:
    """Raise TypeError or ValueError for arguments that do not go together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module, got {type(model).__name__}.")
    if not isinstance(args, SageTrainingArguments):
        raise TypeError(
            f"`args` must be SageTrainingArguments, got {type(args).__name__}."
        )
    adapters = getattr(model, "peft_config", None)
    if isinstance(model, SageClassifier) and adapters:
        raise ValueError(
            f"`model` has the adapters {[*adapters]}: give the PeftModel that `get_peft_model` returned or, "
            "to continue training, that of `PeftModel.from_pretrained(classifier, folder, is_trainable=True)`."
        )
    if peft_config is not None and isinstance(model, PeftModel):
        raise ValueError("`peft_config` needs a `model` that PEFT has not wrapped.")
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    changed = [n for n in LOSS_ARGUMENTS if getattr(args, n) != defaults[n]]
    if compute_loss_func is not None and changed:
        raise ValueError(
            f"`{changed[0]}` is of the loss that SageTrainer makes; set it in `compute_loss_func`, or leave that out."
        )
    terms = [n for n in ("text_prior", "text_guidance") if n in changed]
    has_texts = any(isinstance(m, SageClassifier) for m in model.modules())
    for name in terms:
        if getattr(args, name) and not has_texts:
            raise ValueError(f"`{name}` needs a SageClassifier as `model`.")


def is_map_style(dataset: Any) -> bool:
    """Whether items can be had by position."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def map_style_data(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The data sets whose items can be had by position, by the names that errors call them."""
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        del data["eval_dataset"]
        data |= {f"eval_dataset[{name!r}]": x for name, x in eval_dataset.items()}
    return {name: given for name, given in data.items() if is_map_style(given)}


def column_of(dataset: Any, name: str) -> list[Any] | None:
    """A column of a `datasets.Dataset`, without its images, or of dictionaries by position; None if it has none."""
    if hasattr(dataset, "with_format"):
        found = name in dataset.column_names
        return list(dataset.with_format(None)[name]) if found else None
    if name not in dataset[0]:
        return None
    return [dataset[index][name] for index in range(len(dataset))]


def read_labels(
    dataset: Any, argument: str, label_column: str, num_classes: int | None
) -> Tensor:
    """Read the class indices (n,) of a data set, from `label_column`, "label" or "labels".

    Raises:
        ValueError: There are none, or they are not class indices below `num_classes`. The row is named.
    """
    if not len(dataset):
        raise ValueError(f"`{argument}` must have images, got none.")
    if not hasattr(dataset, "with_format") and not hasattr(dataset[0], "keys"):
        raise ValueError(
            f"`{argument}` must have items that are dictionaries, got {type(dataset[0]).__name__}."
        )
    for name in (label_column, "label", "labels"):
        values = column_of(dataset, name)
        if values is not None:
            highest = inf if num_classes is None else num_classes - 1
            # The message has backticks around the whole, and so around both names.
            labels = [
                check_integer(f"{name}` of `{argument}[{row}]", value, 0, highest)
                for row, value in enumerate(values)
            ]
            return torch.tensor(labels)
    raise ValueError(
        f"`{argument}` must have a column {label_column!r} with class indices, got "
        f"{getattr(dataset, 'column_names', None) or [*dataset[0]]}."
    )


def class_names_of(dataset: Any, label_column: str) -> list[str]:
    """The names that a data set has for its class indices; none if it has none."""
    features = getattr(dataset, "features", None) or {}
    columns = (label_column, "label", "labels")
    names = [getattr(features.get(name), "names", None) for name in columns]
    return next((list(found) for found in names if found), [])


def check_order(
    names: Sequence[str], class_names: Sequence[str] | None, argument: str
) -> None:
    """Raise ValueError if the data set and the model number the same classes differently."""
    known = {name: index for index, name in enumerate(class_names or ())}
    for index, name in enumerate(names):
        if known.get(name, index) != index:
            raise ValueError(
                f"`{argument}` has the class {name!r} at index {index}, the model at {known[name]}: make the "
                "classifier from the texts of this data set, in its order."
            )


def check_collator(collator: Callable[[list[Any]], Any], data: dict[str, Any]) -> None:
    """Raise ValueError if a collator drops the labels; `data` are data sets by the names that errors call them."""
    for name, dataset in data.items():
        batch = collator([dataset[0]])
        keys = list(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
        if "labels" not in keys:
            raise ValueError(
                f"`data_collator` must return a dictionary with `labels`, got {keys} for `{name}`."
            )


def read_groups(dataset: Any) -> Tensor | None:
    """The `group` (n,) of each image, by which near-duplicates stay together; None if the data set has none."""
    values = column_of(dataset, "group") if hasattr(dataset, "with_format") else None
    if values is None or all(value is None for value in values):
        return None
    # An image without a group is one of its own.
    names = [row if value is None else str(value) for row, value in enumerate(values)]
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names])


def read_training_labels(
    model: nn.Module,
    data: dict[str, Any],
    collator: Any,
    compute_loss_func: Any,
) -> tuple[list[int] | None, Tensor]:
    """The numbers of training images (K) and the labels (n,), empty where they cannot be known.

    Raises:
        ValueError: They are needed for the loss and cannot be known, or the labels of a data set are wrong.
    """
    column = getattr(collator, "label_column", "label")
    classifiers = [m for m in model.modules() if isinstance(m, SageClassifier)]
    num_classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classifiers:
        num_classes = len(classifiers[0].text_embeds)
    for name, dataset in data.items():
        names = class_names_of(dataset, column)
        if classifiers:
            check_order(names, classifiers[0].class_names, name)
        num_classes = num_classes or len(names) or None
        if name != "train_dataset" and hasattr(dataset, "with_format"):
            read_labels(dataset, name, column, num_classes)
    unknown = torch.zeros(0, dtype=torch.int64)
    if "train_dataset" not in data:
        return None, unknown
    try:
        labels = read_labels(
            data["train_dataset"], "train_dataset", column, num_classes
        )
    except ValueError:
        if compute_loss_func is None:
            raise
        return None, unknown
    return torch.bincount(labels, minlength=num_classes or 0).tolist(), labels
