# SPDX-License-Identifier: Apache-2.0
"""What a user may say about a Sage adapter."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .descriptions import DEFAULT_TEMPLATES, check_templates, normalise_descriptions
from .registration import PEFT_TYPE_NAME, add_peft_type
from .validation import check_embeddings, check_number, is_int


add_peft_type(PEFT_TYPE_NAME)

#: Names of an adapter's weights file, in the order in which PEFT looks for them.
WEIGHTS_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


@dataclass
class SageConfig(PeftConfig):
    """Configuration of a [`SageModel`]: a semantic-guided adapter in the blocks of a vision tower.

    The class descriptions (or a tensor of their embeddings) are the guidance that the adapter attends to. With
    neither, the adapter is an AdaptFormer without attention.

    Args:
        class_descriptions (`list[str]`, `list[list[str]]` or `dict[str, str | list[str]]`, *optional*):
            What the classes look like, in the order of the class indices. A list of strings holds class names, which
            are put into `text_templates`; a list of lists, or a dictionary from class name to one or more texts, holds
            written descriptions, which are used as they are. Encoded by the model's own text tower.
        class_names (`list[str]`, *optional*):
            Names of the classes; filled in from `class_descriptions` where that has names.
        guidance (`torch.Tensor`, *optional*):
            A float tensor (M, e) with one embedding a class, instead of encoding texts. Rows are L2-normalised. A
            run-time field: it is saved with the weights of the adapter, not in the configuration file.
        guidance_shape (`list[int]`, *optional*):
            (M, e) of the adapter that a saved configuration belongs to, (0, 0) without guidance. Filled in; not to be
            given.
        guidance_rows (`int`, *optional*):
            At most so many rows of guidance: the embeddings of more `class_descriptions` are pooled to so many groups
            of similar classes ([`pool_guidance`]), which makes the adapter faster. Default: one row a class.
        text_templates (`list[str]`, *optional*):
            Templates with one `{}` each, used for classes that have only a name. Default `["a photo of a {}."]`.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer for the texts; default: where the base model came from.
        r (`int`, *optional*):
            Width of the bottleneck. Default: from the number of classes C and of adapted blocks L as in LIFT,
            2^max(0, floor(log2(C / (2 L)))), but at least 8.
        num_heads (`int`):
            Attention heads; `r` must be divisible by it.
            One head did as well as four on the validation split of Emoji-LT (RESULTS.md, sensitivity).
        scaling (`float`):
            Factor of the adapter's output; where it starts if `learnable_scaling`.
        learnable_scaling (`bool`):
            Whether the factor is a trained scalar in each block. It then starts at `scaling` divided by the mean
            absolute LayerScale of the block, where the block has one, so that the adapter is not born dead.
        dropout (`float`):
            Dropout on the bottleneck while training.
        target_modules (`str` or `list[str]`, *optional*):
            Modules to adapt, as in PEFT: a regular expression (full match) or a list of name endings. Each must map
            (..., d) to (..., d). Default: the MLP of every block of the vision tower; it stays `None` in the saved
            configuration so that the adapter loads on every class that holds the same tower.
        exclude_modules (`str` or `list[str]`, *optional*):
            Modules that are left out, in the same two forms.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Only these blocks. With the default targets, the depth of the block in the vision tower (negative: from the
            end); with a list of names, the number in the name, as in PEFT. Not allowed with a regular expression.
        layers_pattern (`str` or `list[str]`, *optional*):
            Name of the list of blocks in front of that number, as in PEFT; only with a list of names.
        modules_to_save (`list[str]`, *optional*):
            Further modules that are trained and saved with the adapter, such as `["class_head"]`.
        init_weights (`bool`):
            `True`: the up-projection starts at zero, so that the wrapped model equals the base model. `False`: all
            projections start random (for tests).

    Raises:
        ValueError: For values that are out of range or do not go together.
        TypeError: For values of the wrong type.

    Reference: arXiv 2507.12807 for guidance by class descriptions through attention; the form of the layer is ours
    (see [`SageLayer`]).
    """

    class_descriptions: list[str] | list[list[str]] | dict[str, str | list[str]] | None = field(
        default=None, metadata={"help": "Class names (list of str) or written descriptions (list of lists, or dict)."}
    )
    class_names: list[str] | None = field(default=None, metadata={"help": "Names of the classes, in index order."})
    guidance: torch.Tensor | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "Embeddings (M, e) of the class descriptions, instead of texts. Not serialised."},
    )
    guidance_shape: list[int] | None = field(
        default=None, metadata={"help": "(M, e) of the saved guidance. Filled in by the tuner."}
    )
    guidance_rows: int | None = field(
        default=None, metadata={"help": "Pool the class descriptions to so many rows; default: one row a class."}
    )
    text_templates: list[str] | None = field(
        default=None, metadata={"help": f"Templates for classes that have only a name; default {DEFAULT_TEMPLATES}."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer for the texts; default: where the base model came from."}
    )
    r: int | None = field(default=None, metadata={"help": "Width of the bottleneck; default: from the class count."})
    num_heads: int = field(default=1, metadata={"help": "Attention heads; must divide `r`."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output (its start, if learnable)."})
    learnable_scaling: bool = field(default=True, metadata={"help": "Train the factor, one scalar a block."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the bottleneck while training."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; default: the MLP of every block of the vision tower."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that are left out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these blocks."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks; only with a list of names in `target_modules`."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved with the adapter."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity (up-projection zero)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not None:
            # PEFT would wrap the model in a class for language models, which asks for methods that this one lacks.
            raise ValueError(f"`task_type` must be None: PEFT has none for images, got {self.task_type!r}.")
        self.peft_type = PeftType[PEFT_TYPE_NAME]
        if self.class_descriptions is not None:
            if isinstance(self.class_descriptions, Mapping) and self.class_names is not None:
                raise ValueError("`class_names` must not be given when `class_descriptions` is a dict with names.")
            names, self.class_descriptions = normalise_descriptions(self.class_descriptions)
            self.class_names = names if self.class_names is None else self.class_names
        self._check_classes()
        self._check_layer()
        self._check_targets()

    @property
    def saved(self) -> bool:
        """Whether this is the configuration of a saved adapter, whose guidance comes from its weights file."""
        return self._saved and self.guidance_shape is not None and self.guidance is None

    @property
    def source(self) -> tuple[str, dict[str, Any]] | None:
        """Where the configuration was read: folder or repository, and the arguments for a download."""
        return self.__dict__.get("_source")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the configuration of a saved adapter, and remember where it was.

        So the weights beside it can be checked before a model is changed.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hub.
            subfolder: Folder inside it.
            **kwargs: As PEFT takes them, such as `revision` and `token`.

        Returns:
            The configuration, of the class that its `peft_type` names.

        Raises:
            ValueError: If there is no such configuration, or it is not valid.
            TypeError: If it holds values of the wrong type.
        """
        if subfolder is not None and (os.path.isabs(subfolder) or ".." in subfolder.replace("\\", "/").split("/")):
            raise ValueError(f"`subfolder` must be a path inside the folder of the adapter, got {subfolder!r}.")
        config = super().from_pretrained(os.fspath(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        if not isinstance(config, SageConfig):
            return config
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if not config.saved and any(os.path.isfile(os.path.join(folder, name)) for name in WEIGHTS_NAMES):
            raise ValueError(
                f"The configuration in {folder!r} has no `guidance_shape`, but there are weights beside it: it is not "
                "theirs, or it was edited."
            )
        if not kwargs.get("ignore_mismatched_sizes"):
            hub_kwargs = cls._split_kwargs(kwargs)[0]
            source = os.fspath(pretrained_model_name_or_path), {**hub_kwargs, "subfolder": subfolder}
            config.__dict__["_source"] = source
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration. It is written beside and then renamed, so that an old file stays whole.

        Args:
            save_directory: The folder; it is made if need be.
            **kwargs: As PEFT takes them.

        Raises:
            ValueError: If `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, but {save_directory!r} is a file.")
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".") as beside:
            super().save_pretrained(beside, **kwargs)
            os.replace(os.path.join(beside, CONFIG_NAME), os.path.join(save_directory, CONFIG_NAME))
        if kwargs.get("auto_mapping_dict"):  # as PEFT passes it when it saves an adapter
            from .model_card import replace_template_card

            replace_template_card(os.fspath(save_directory), self, kwargs["auto_mapping_dict"]["base_model_class"])

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the configuration file: everything but the run-time tensor `guidance`."""
        names = [entry.name for entry in fields(self) if entry.name != "guidance"]
        config = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}

    def _check_classes(self) -> None:
        if self.text_templates is not None:
            self.text_templates = check_templates(self.text_templates)
        if self.guidance_rows is not None and (not is_int(self.guidance_rows) or self.guidance_rows < 1):
            raise ValueError(f"`guidance_rows` must be a positive integer or None, got {self.guidance_rows!r}.")
        if self.guidance_shape is not None:
            shape = self.guidance_shape
            sizes = isinstance(shape, (list, tuple)) and all(is_int(size) and size >= 0 for size in shape)
            if not sizes or len(shape) != 2:
                raise ValueError(f"`guidance_shape` must be a list of two integers (M, e), got {shape!r}.")
            self.guidance_shape = list(shape)
        # Set here and not where the tuner fills the shape in: so a user's own object can be used twice.
        self._saved = self.guidance_shape is not None
        if self.guidance is not None:
            check_embeddings(self.guidance, "guidance")
            if self.guidance_rows is not None and self.guidance_rows < len(self.guidance):
                raise ValueError(
                    f"`guidance_rows` pools `class_descriptions`, but `guidance` is a tensor of {len(self.guidance)} "
                    f"rows, got guidance_rows={self.guidance_rows}; pool the tensor with `pool_guidance` instead."
                )
            if self.class_descriptions is not None and len(self.class_descriptions) != len(self.guidance):
                raise ValueError(
                    f"`guidance` has {len(self.guidance)} rows, but `class_descriptions` has "
                    f"{len(self.class_descriptions)} classes; give one row a class, or only one of the two."
                )
        count = self.num_classes
        if self.class_names is not None and count and len(self.class_names) != count:
            raise ValueError(f"`class_names` has {len(self.class_names)} entries, but there are {count} classes.")

    def _check_layer(self) -> None:
        if not is_int(self.num_heads) or self.num_heads < 1:
            raise ValueError(f"`num_heads` must be a positive integer, got {self.num_heads!r}.")
        if self.r is not None:
            if not is_int(self.r) or self.r < 1:
                raise ValueError(f"`r` must be a positive integer or None, got {self.r!r}.")
            if self.r > 2**16:
                raise ValueError(f"`r` must be at most 65536, got {self.r}.")
            if self.r % self.num_heads:
                raise ValueError(f"`r` must be divisible by `num_heads`, got r={self.r}, num_heads={self.num_heads}.")
        check_number("scaling", self.scaling, -1e6, 1e6)
        check_number("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}, which would leave nothing.")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if not isinstance(value, (list, tuple, set)) or not all(isinstance(entry, str) for entry in value):
                raise TypeError(f"`{name}` must be a str or a list of str, got {value!r}.")
            setattr(self, name, set(value))
        names = self.modules_to_save
        are_names = isinstance(names, (list, tuple, set)) and all(isinstance(name, str) for name in names)
        if names is not None and not are_names:
            raise TypeError(f"`modules_to_save` must be a list of str, got {names!r}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else value or []:
                _check_pattern(name, pattern)
        layers = self.layers_to_transform
        if layers is not None:
            layers = [layers] if is_int(layers) else layers
            if not isinstance(layers, (list, tuple)) or not layers or not all(is_int(layer) for layer in layers):
                raise ValueError(f"`layers_to_transform` must be an integer or a list of them, got {layers!r}.")
            if isinstance(self.target_modules, str):
                raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
            if self.target_modules is not None and min(layers) < 0:
                raise ValueError(f"`layers_to_transform` must not be negative with `target_modules`, got {layers!r}.")
        if self.layers_pattern is not None and not isinstance(self.target_modules, set):
            raise ValueError("`layers_pattern` can only be used when `target_modules` is a list of names.")

    @property
    def num_classes(self) -> int:
        """Number of classes that the guidance stands for; 0 without guidance.

        These are its rows M, unless `guidance_rows` has pooled the class descriptions to fewer.
        """
        if self.guidance is not None:
            return len(self.guidance)
        if self.class_descriptions is not None:
            return len(self.class_descriptions)
        return self.guidance_shape[0] if self.guidance_shape else 0


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"`{name}` must hold names or regular expressions, got {pattern!r}: {error}.") from error
