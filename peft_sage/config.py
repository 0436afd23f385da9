# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Sage adapter."""

import copy
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from peft import PeftConfig, PeftType
from torch import Tensor

from .descriptions import check_templates, normalise_descriptions
from .registration import PEFT_TYPE_NAME, add_peft_type
from .validation import check_embeddings, check_integer, check_number


add_peft_type(PEFT_TYPE_NAME)

Texts = list[str] | list[list[str]] | dict[str, str | list[str]]


def _with_help(cls: type) -> type:
    """Give each field of a dataclass what the docstring says about it, as `metadata["help"]`."""
    entry = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
    for name, text in entry.findall(inspect.getdoc(cls) or ""):
        described = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
        described.metadata = MappingProxyType({"help": " ".join(text.split())})
    return cls


@_with_help
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
        guidance: A float tensor (M, e), one row per class, instead of texts. L2-normalised. It is saved with the
            weights, not in the configuration file.
        guidance_rows: At most this many rows of guidance; more classes are pooled to groups of similar ones
            ([`pool_guidance`]). 0: no guidance.
        text_templates: Texts with one `{}` each, for classes that have only a name. Default: "a photo of a {}.".
        tokenizer_name_or_path: Tokenizer for the texts. Default: that of the base model.
        r: Width of the bottleneck. Default: as in LIFT (arXiv 2309.10019), from the number of classes C and of
            adapted blocks L, 2^max(0, floor(log2(C / (2 L)))), but at least 8.
        num_heads: Attention heads; must divide `r`.
        scaling: Factor of the adapter's output; its initial value if `learnable_scaling`.
        learnable_scaling: Train the factor, one scalar per block. It starts at `scaling` divided by the mean absolute
            LayerScale of the block, where there is one, so that its update is not suppressed at initialisation.
        dropout: Dropout on the bottleneck while training.
        init_weights: Start as the identity: the up-projection is zero. `False`: random (for tests).
        target_modules: Modules of the vision tower to adapt, each from (..., d) to (..., d): a regular expression
            (full match) or a list of name endings. Default: the MLP of every block.
        exclude_modules: Modules that are left out, in the same two forms.
        layers_to_transform: Only these blocks. With the default targets their depth in the vision tower (negative:
            from the end); with a list of names the number in the name, as in PEFT.
        layers_pattern: Name of the list of blocks in front of that number; only with a list of names.
        modules_to_save: Further modules that are trained and saved with the adapter. Default: the `class_head` of a
            [`SageClassifier`]; `[]` for none.

    Other Args: filled in when the adapter is made, and saved with it
        class_names: Names of the classes, from `class_descriptions` or the classifier, where they have names. They
            may be given with `guidance`.
        guidance_shape: (M, e) of the guidance; (0, 0) without.

    Raises:
        TypeError, ValueError: For values of the wrong type, out of range, or that do not go together.

    Reference: arXiv 2507.12807 for guidance by class descriptions through attention; see [`SageLayer`] for the form.
    """

    class_descriptions: Texts | None = None
    guidance: Tensor | None = field(default=None, repr=False, compare=False)
    guidance_rows: int = 64
    text_templates: list[str] | None = None
    tokenizer_name_or_path: str | None = None
    r: int | None = None
    num_heads: int = 1
    scaling: float = 1.0
    learnable_scaling: bool = True
    dropout: float = 0.0
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    # Filled in
    class_names: list[str] | None = None
    guidance_shape: list[int] | None = None

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
        # Kept apart from `guidance_shape`, which is filled in for new adapters as well.
        self._from_file = self.guidance_shape is not None

    @property
    def saved(self) -> bool:
        """Whether this is the configuration of a saved adapter, whose guidance comes from its weights file."""
        given = self.guidance is not None or self.guidance_shape is None
        return self._from_file and not given

    @property
    def num_classes(self) -> int:
        """Number of classes that the guidance stands for: more than its rows, where they were pooled; 0 without."""
        for classes in (self.class_descriptions, self.class_names, self.guidance):
            if classes is not None:
                return len(classes)
        return self.guidance_shape[0] if self.guidance_shape else 0

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the configuration file: everything but the tensor `guidance`."""
        config = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, set):
                value = sorted(value)
            if entry.name != "guidance":
                config[entry.name] = copy.deepcopy(value)
        return config

    def _check_classes(self) -> None:
        if self.class_names is not None:
            self.class_names = _strings("class_names", self.class_names)
        if self.class_descriptions is not None:
            if self.class_names and isinstance(self.class_descriptions, Mapping):
                raise ValueError(
                    "`class_names` must not be given when `class_descriptions` is a dict with names."
                )
            names, self.class_descriptions = normalise_descriptions(
                self.class_descriptions
            )
            self.class_names = names if self.class_names is None else self.class_names
        if self.guidance is not None:
            check_embeddings(self.guidance, "guidance")
        for name in ("class_names", "guidance"):
            classes = getattr(self, name)
            if classes is not None and len(classes) != self.num_classes:
                raise ValueError(
                    f"`{name}` has {len(classes)} entries, but there are {self.num_classes} classes."
                )
        if self.text_templates is not None:
            self.text_templates = check_templates(self.text_templates)
        if self.tokenizer_name_or_path is not None:
            if not isinstance(self.tokenizer_name_or_path, (str, os.PathLike)):
                raise TypeError(
                    f"`tokenizer_name_or_path` must be a str, got {self.tokenizer_name_or_path!r}."
                )
            self.tokenizer_name_or_path = os.fspath(self.tokenizer_name_or_path)
        self._check_guidance_shape()

    def _check_guidance_shape(self) -> None:
        self.guidance_rows = check_integer("guidance_rows", self.guidance_rows, 0)
        if self.guidance_shape is None:
            return
        shape = _integers("guidance_shape", self.guidance_shape)
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(
                f"`guidance_shape` must be a list of two integers (M, e), got {shape!r}."
            )
        if self.num_classes < shape[0]:
            raise ValueError(
                f"`guidance_shape` has {shape[0]} rows, but there are {self.num_classes} classes."
            )
        self.guidance_shape = shape

    def _check_layer(self) -> None:
        self.num_heads = check_integer("num_heads", self.num_heads, 1)
        if self.r is not None:
            # A damaged file must not fill the memory.
            self.r = check_integer("r", self.r, 1, 2**16)
            if self.r % self.num_heads:
                raise ValueError(
                    f"`r` must be divisible by `num_heads`, got r={self.r}, num_heads={self.num_heads}."
                )
        self.scaling = check_number("scaling", self.scaling, -1e6, 1e6)
        self.dropout = check_number("dropout", self.dropout, 0, 0.999)
        for name in ("learnable_scaling", "init_weights"):
            value = getattr(self, name)
            if type(value).__name__ not in ("bool", "bool_"):  # also NumPy's
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")
            setattr(self, name, bool(value))

    def _check_targets(self) -> None:
        self.target_modules = _patterns("target_modules", self.target_modules, set)
        self.exclude_modules = _patterns("exclude_modules", self.exclude_modules, set)
        self.layers_pattern = _patterns("layers_pattern", self.layers_pattern)
        if self.modules_to_save is not None:
            names = _strings("modules_to_save", self.modules_to_save)
            self.modules_to_save = _patterns("modules_to_save", names)
        if self.layers_to_transform is not None:
            layers = _integers("layers_to_transform", self.layers_to_transform)
            self.layers_to_transform = layers
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


def _strings(name: str, value: Any) -> list[str]:
    """Read any collection of strings, in its order, as a list of plain ones."""
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, Mapping))
    entries = list(value) if is_list else [None]
    if not all(isinstance(entry, str) for entry in entries):
        raise TypeError(f"`{name}` must be a list of str, got {value!r}.")
    return [str(entry) for entry in entries]


def _patterns(name: str, value: Any, collection: type = list) -> Any:
    """Read names or regular expressions, one as a str or more as a collection; None stays."""
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else _strings(name, value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` must hold names or regular expressions, got {pattern!r}."
            ) from error
    return value if isinstance(value, str) else collection(patterns)


def _integers(name: str, value: Any) -> list[int]:
    """Read an integer or any collection of them, as a list of plain ones."""
    is_collection = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    entries = list(value) if is_collection else [value]
    for entry in entries or [None]:
        if isinstance(entry, bool) or not hasattr(entry, "__index__"):
            raise ValueError(
                f"`{name}` must be an integer or a list of them, got {value!r}."
            )
    return [int(entry) for entry in entries]
