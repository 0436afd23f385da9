# SPDX-License-Identifier: Apache-2.0
"""What [`SageTrainer`] checks of its arguments and data before anything is computed or changed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from .arguments import SageTrainingArguments
from .classifier import SageClassifier


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


def is_table_of_datasets(dataset: Any) -> bool:
    """Whether it is a `datasets.Dataset`, without asking for that library."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "with_format")


def read_labels(
    dataset: Any,
    argument: str,
    label_column: str = "label",
    num_classes: int | None = None,
    ignored: int | None = None,
) -> Tensor:
    """Read the class indices (n,) of a data set.

    Args:
        dataset: One of `datasets`, or dictionaries by position.
        argument: What errors call it.
        label_column: Name of its labels, unless that is "labels".
        num_classes: Class indices must be smaller.
        ignored: A label that is allowed besides.

    Raises:
        ValueError: There are none, or they are not class indices. The row is named.
    """
    if not len(dataset):
        raise ValueError(f"`{argument}` must have images, got none.")
    is_table = is_table_of_datasets(dataset)
    columns = dataset.column_names if is_table else _keys(dataset[0], argument)
    name = next((c for c in (label_column, "label", "labels") if c in columns), None)
    if name is None:
        raise ValueError(
            f"`{argument}` must have a column {label_column!r} with class indices, got {list(columns)}."
        )
    if is_table:
        values = list(dataset.with_format(None)[name])
    else:
        values = [dataset[index][name] for index in range(len(dataset))]
    limit = float("inf") if num_classes is None else num_classes
    for row, value in enumerate(values):
        label = value.item() if hasattr(value, "item") and not _size(value) else value
        is_index = isinstance(label, int) and not isinstance(label, bool)
        if not is_index or not (0 <= label < limit or label == ignored):
            below = "" if num_classes is None else f" below {num_classes}"
            raise ValueError(
                f"`{argument}` must have class indices{below} in {name!r}, got {value!r} in row {row}."
            )
    return torch.tensor([int(value) for value in values])


def _keys(item: Any, argument: str) -> list[str]:
    if not hasattr(item, "keys"):
        raise ValueError(
            f"`{argument}` must have items that are dictionaries, got {type(item).__name__}."
        )
    return list(item.keys())


def _size(value: Any) -> int:
    return len(getattr(value, "shape", ()))


def class_names_of(dataset: Any, label_column: str = "label") -> list[str] | None:
    """The names that a data set has for its class indices."""
    features = getattr(dataset, "features", None) or {}
    for name in (label_column, "label", "labels"):
        if hasattr(features.get(name), "names"):
            return list(features[name].names)
    return None


def check_order(
    names: Sequence[str] | None, class_names: Sequence[str] | None, argument: str
) -> None:
    """Raise ValueError if the data set and the model number the same classes differently."""
    known = list(class_names or ())
    for index, name in enumerate(names or ()):
        if name in known and known.index(name) != index:
            raise ValueError(
                f"`{argument}` has the class {name!r} at index {index}, the model at {known.index(name)}: make the "
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
    if "group" not in (getattr(dataset, "column_names", None) or ()):
        return None
    values = list(dataset.with_format(None)["group"])
    if all(value is None for value in values):
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
    classifier = next(
        (m for m in model.modules() if isinstance(m, SageClassifier)), None
    )
    num_classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classifier is not None:
        num_classes = len(classifier.text_embeds)
    for name, dataset in data.items():
        names = class_names_of(dataset, column)
        if classifier is not None:
            check_order(names, classifier.class_names, name)
        num_classes = num_classes or (len(names) if names else None)
        if name != "train_dataset" and is_table_of_datasets(dataset):
            read_labels(dataset, name, column, num_classes)
    if "train_dataset" not in data:
        return None, torch.zeros(0, dtype=torch.int64)
    try:
        labels = read_labels(
            data["train_dataset"], "train_dataset", column, num_classes
        )
    except ValueError:
        if compute_loss_func is None:
            raise
        return None, torch.zeros(0, dtype=torch.int64)
    counts = torch.bincount(labels, minlength=num_classes or 0)
    return counts.tolist(), labels
