# SPDX-License-Identifier: Apache-2.0
"""What a user may say about a Sage adapter."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from peft import PeftConfig, PeftType
from torch import Tensor

from .descriptions import DEFAULT_TEMPLATES, check_templates, normalise_descriptions
from .registration import PEFT_TYPE_NAME, add_peft_type
from .validation import check_embeddings, check_integer, check_number, is_int


add_peft_type(PEFT_TYPE_NAME)

Texts = list[str] | list[list[str]] | dict[str, str | list[str]]


def _is_list(value: Any, fits: Callable[[Any], bool]) -> TypeGuard[list[Any]]:
    return isinstance(value, (list, tuple, set)) and all(map(fits, value))


def _option(default: Any, text: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text}, **kwargs)


@dataclass
class SageConfig(PeftConfig):
    """Configuration of a [`SageModel`]: semantic-guided adapters in the blocks of a vision tower.

    The adapters attend to embeddings of the class descriptions, the guidance. It comes from `guidance`, from
    `class_descriptions`, or from the `text_embeds` of a [`SageClassifier`]; without any of them, or with
    `guidance_rows=0`, the adapter is an AdaptFormer (arXiv 2205.13535) without attention.

    Args:
        class_descriptions: What the classes look like, in the order of the class indices: a list of names, which are
            put into `text_templates`; or a list of lists, or a dictionary from name to one or more texts, which are
            used as they are. Encoded by the model's own text tower.
        class_names: Filled in from `class_descriptions` or the classifier, where they have names.
        guidance: A float tensor (M, e), one row per class, instead of texts. L2-normalised. It is saved with the
            weights, not in the configuration file.
        guidance_rows: At most this many rows of guidance; more classes are pooled to groups of similar ones
            ([`pool_guidance`]). 0: no guidance.
        guidance_shape: (M, e) of a saved adapter, (0, 0) without guidance. Filled in.
        row_names: Which classes each of the M rows stands for. Filled in.
        text_templates: Texts with one `{}` each, for classes that have only a name. Default: "a photo of a {}.".
        tokenizer_name_or_path: Tokenizer for the texts. Default: that of the base model.
        r: Width of the bottleneck. Default: as in LIFT (arXiv 2309.10019), from the number of classes C and of
            adapted blocks L, 2^max(0, floor(log2(C / (2 L)))), but at least 8.
        num_heads: Attention heads; must divide `r`.
        scaling: Factor of the adapter's output; where it starts if `learnable_scaling`.
        learnable_scaling: Train the factor, one scalar per block. It starts at `scaling` divided by the mean absolute
            LayerScale of the block, where there is one, so that the adapter is not born dead.
        dropout: Dropout on the bottleneck while training.
        target_modules: Modules to adapt, each from (..., d) to (..., d): a regular expression (full match) or a list
            of name endings. Default: the MLP of every block of the vision tower.
        exclude_modules: Modules that are left out, in the same two forms.
        layers_to_transform: Only these blocks. With the default targets their depth in the vision tower (negative:
            from the end); with a list of names the number in the name, as in PEFT.
        layers_pattern: Name of the list of blocks in front of that number; only with a list of names.
        modules_to_save: Further modules that are trained and saved with the adapter. Default: the `class_head` of a
            [`SageClassifier`]; `[]` for none.
        init_weights: Start as the identity: the up-projection is zero. `False`: random (for tests).

    Raises:
        TypeError, ValueError: For values of the wrong type, out of range, or that do not go together.

    Reference: arXiv 2507.12807 for guidance by class descriptions through attention; see [`SageLayer`] for the form.
    """

    class_descriptions: Texts | None = _option(
        None, "Class names (list of str) or texts (list of lists, or dict)."
    )
    class_names: list[str] | None = _option(
        None, "Names of the classes, in index order."
    )
    guidance: Tensor | None = _option(
        None, "Embeddings (M, e). Not serialised.", repr=False, compare=False
    )
    guidance_rows: int = _option(64, "At most this many rows; 0: none.")
    guidance_shape: list[int] | None = _option(
        None, "(M, e) of the saved guidance. Filled in by the tuner."
    )
    row_names: list[str] | None = _option(
        None, "Which classes each row stands for. Filled in by the tuner."
    )
    text_templates: list[str] | None = _option(
        None, f"Templates for bare names; default {DEFAULT_TEMPLATES}."
    )
    tokenizer_name_or_path: str | None = _option(
        None, "Tokenizer for the texts; default: the base model's."
    )
    r: int | None = _option(
        None, "Width of the bottleneck; default: from the number of classes."
    )
    num_heads: int = _option(1, "Attention heads; must divide `r`.")
    scaling: float = _option(
        1.0, "Factor of the adapter's output (its start, if learnable)."
    )
    learnable_scaling: bool = _option(True, "Train the factor, one scalar per block.")
    dropout: float = _option(0.0, "Dropout on the bottleneck while training.")
    target_modules: list[str] | str | None = _option(
        None, "Default: the MLP of every block of the vision tower."
    )
    exclude_modules: list[str] | str | None = _option(
        None, "Modules that are left out."
    )
    layers_to_transform: list[int] | int | None = _option(None, "Only these blocks.")
    layers_pattern: list[str] | str | None = _option(
        None, "Name of the list of blocks; only with a list of names."
    )
    modules_to_save: list[str] | None = _option(
        None, "Further modules that are trained and saved with the adapter."
    )
    init_weights: bool = _option(True, "Start as the identity (up-projection zero).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not None:
            # PEFT would wrap the model in a class for language models, which asks for methods that this one lacks.
            raise ValueError(
                f"`task_type` must be None: PEFT has none for images, got {self.task_type!r}."
            )
        self.peft_type = PeftType[PEFT_TYPE_NAME]
        self._check_classes()
        self._check_layer()
        self._check_targets()
        # Kept apart from `guidance_shape`, which the tuner fills in.
        self._saved = self.guidance_shape is not None

    @property
    def saved(self) -> bool:
        """Whether this is the configuration of a saved adapter, whose guidance comes from its weights file."""
        return self._saved and self.guidance_shape is not None and self.guidance is None

    @property
    def num_classes(self) -> int:
        """Number of classes that the guidance stands for: more than its rows, where they were pooled; 0 without."""
        known = (self.class_descriptions, self.class_names, self.guidance)
        rows = self.guidance_shape[0] if self.guidance_shape else 0
        return next((len(classes) for classes in known if classes is not None), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the configuration file: everything but the tensor `guidance`."""
        config = {
            f.name: copy.deepcopy(getattr(self, f.name))
            for f in fields(self)
            if f.name != "guidance"
        }
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in config.items()
        }

    def _check_classes(self) -> None:
        if self.class_descriptions is not None:
            if (
                isinstance(self.class_descriptions, Mapping)
                and self.class_names is not None
            ):
                raise ValueError(
                    "`class_names` must not be given when `class_descriptions` is a dict with names."
                )
            names, self.class_descriptions = normalise_descriptions(
                self.class_descriptions
            )
            self.class_names = names if self.class_names is None else self.class_names
        if self.text_templates is not None:
            self.text_templates = check_templates(self.text_templates)
        check_integer("guidance_rows", self.guidance_rows, 0)
        if (shape := self.guidance_shape) is not None:
            if not _is_list(shape, is_int) or len(shape) != 2 or min(shape) < 0:
                raise ValueError(
                    f"`guidance_shape` must be a list of two integers (M, e), got {shape!r}."
                )
            if self.num_classes < shape[0]:
                raise ValueError(
                    f"`guidance_shape` has {shape[0]} rows, but there are {self.num_classes} classes."
                )
            self.guidance_shape = list(shape)
        if self.guidance is not None:
            check_embeddings(self.guidance, "guidance")
        for name in ("class_names", "guidance"):
            classes = getattr(self, name)
            if classes is not None and len(classes) != self.num_classes:
                raise ValueError(
                    f"`{name}` has {len(classes)} entries, but there are {self.num_classes} classes."
                )

    def _check_layer(self) -> None:
        check_integer("num_heads", self.num_heads, 1)
        if self.r is not None:
            check_integer(
                "r", self.r, 1, 2**16
            )  # a damaged file must not fill the memory
            if self.r % self.num_heads:
                raise ValueError(
                    f"`r` must be divisible by `num_heads`, got r={self.r}, num_heads={self.num_heads}."
                )
        check_number("scaling", self.scaling, -1e6, 1e6)
        check_number("dropout", self.dropout, 0, 0.999)

    def _check_targets(self) -> None:
        for name in (
            "target_modules",
            "exclude_modules",
            "layers_pattern",
            "modules_to_save",
        ):
            value = getattr(self, name)
            patterns = (
                [value]
                if isinstance(value, str) and name != "modules_to_save"
                else value
            )
            if patterns is not None and not _is_list(
                patterns, lambda entry: isinstance(entry, str)
            ):
                raise TypeError(
                    f"`{name}` must be a str or a list of str, got {value!r}."
                )
            for pattern in patterns or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"`{name}` must hold names or regular expressions, got {pattern!r}."
                    ) from error
            if isinstance(value, (list, tuple, set)) and name in (
                "target_modules",
                "exclude_modules",
            ):
                setattr(self, name, set(value))
        layers: Any = (
            [self.layers_to_transform]
            if is_int(self.layers_to_transform)
            else self.layers_to_transform
        )
        if layers is not None:
            if not layers or not _is_list(layers, is_int):
                raise ValueError(
                    f"`layers_to_transform` must be an integer or a list of them, got {layers!r}."
                )
            if isinstance(self.target_modules, str):
                raise ValueError(
                    "`layers_to_transform` cannot be used when `target_modules` is a str."
                )
            if self.target_modules is not None and min(layers) < 0:
                raise ValueError(
                    f"`layers_to_transform` must not be negative with `target_modules`, got {layers!r}."
                )
        if self.layers_pattern is not None and not isinstance(self.target_modules, set):
            raise ValueError(
                "`layers_pattern` can only be used when `target_modules` is a list of names."
            )
