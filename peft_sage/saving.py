# SPDX-License-Identifier: Apache-2.0
"""What a classifier leaves in a folder or repository, in PEFT's format, and what is found there."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    get_peft_model_state_dict,
    load_peft_weights,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel
from transformers.utils.peft_utils import find_adapter_config_file

from .config import SageConfig
from .head import read_extra_state


HEAD_STATE = "class_head._extra_state"


class Saved:
    """What a folder or repository holds: an adapter with the head of a classifier, or a base model.

    Args:
        source: Folder, or repository on the Hub.
        kwargs: Arguments of the user; those that say where to look are taken out.

    Raises:
        ValueError: There is no such folder, the adapter has no `class_head`, or only subfolders hold adapters.
    """

    def __init__(self, source: str, kwargs: dict[str, Any]) -> None:
        if source.startswith((".", "/", "~")) and not os.path.isdir(source):
            raise ValueError(f"There is no folder {source!r}.")
        self.source = self.base = source
        self.hub = self.base_hub = hub_arguments(kwargs)
        shared = dict(self.hub)
        for name in ("revision", "subfolder"):
            if (value := kwargs.pop(name, None)) is not None:
                self.hub[name] = value
        self.config = find_adapter(source, self.hub)
        self.image_processor: dict[str, Any] | None = None
        self.whole = self._find_whole() if self.config is None else None
        if self.whole is not None:
            self.base = ""
            head = read_extra_state(self.whole[HEAD_STATE])
            self.image_processor = head["image_processor"]
        if self.config is not None:
            head = self._read_head()
            self.image_processor = head["image_processor"]
            # The configuration says which base model, and it or the head which revision of it.
            self.base = self.config.base_model_name_or_path or ""
            revision = self.config.revision or head["base_revision"]
            self.base_hub = shared | {"revision": revision}

    def load_base(self, **kwargs: Any) -> nn.Module:
        """Load the base model, in float32 if not asked otherwise; ValueError if it is not known or not there."""
        if not self.base:
            raise ValueError(
                f"What is saved in {self.source!r} does not name its base model: give it as `clip`."
            )
        if os.path.isabs(self.base) and not os.path.isdir(self.base):
            raise ValueError(
                f"The base model of {self.source!r} is not in {self.base!r} any more: give it as `clip`."
            )
        return load_model(self.base, **self.base_hub, **kwargs)

    def load_image_processor(self) -> Any:
        """The image processor of the folder, or else of the base model, unless the head brings its own."""
        saved = self.image_processor
        processor = None
        if not (saved and saved["settings"]):
            processor = load_if_any(AutoImageProcessor, self.source, self.hub)
        if processor is None and saved is None:
            processor = load_if_any(AutoImageProcessor, self.base, self.base_hub)
        return processor

    def _read_head(self) -> dict[str, Any]:
        weights = load_peft_weights(self.source, device="cpu", **self.hub)
        state = weights.get(f"base_model.model.{HEAD_STATE}")
        if state is None:
            raise ValueError(
                f"The adapter in {self.source!r} holds no `class_head`: it is not of a SageClassifier."
            )
        return read_extra_state(state)

    def _find_whole(self) -> dict[str, torch.Tensor] | None:
        """The weights of a classifier without PEFT, which Trainer saves whole and without a configuration."""
        path = Path(self.source, self.hub.get("subfolder", ""), "model.safetensors")
        if not path.is_file() or path.with_name("config.json").exists():
            return None
        state = load_file(path)
        return state if HEAD_STATE in state else None


def find_adapter(source: str, hub: dict[str, Any]) -> PeftConfig | None:
    """The configuration of an adapter, None without one; ValueError if there are only some in subfolders."""
    if find_adapter_config_file(source, **hub):
        return PeftConfig.from_pretrained(source, **hub)
    folder = Path(source, hub.get("subfolder", ""))
    inside = [path.parent.name for path in folder.glob("*/adapter_config.json")]
    if inside and not (folder / "config.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds no adapter, but its subfolders {sorted(inside)} do: give one of them to "
            "`SageClassifier.from_pretrained` as `subfolder`."
        )
    return None


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take out of some arguments those that say how to reach the Hub."""
    names = ("token", "cache_dir", "local_files_only", "force_download")
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def load_model(name: str, **kwargs: Any) -> nn.Module:
    """A model of transformers, in float32 if not asked otherwise."""
    if "subfolder" in kwargs:
        raise ValueError(
            f"`subfolder` cannot be kept with the name {name!r} of a base model: load the model from it and give that."
        )
    dtype = kwargs.pop("torch_dtype", torch.float32)
    return AutoModel.from_pretrained(name, **({"dtype": dtype} | kwargs))


def load_if_any(auto_class: Any, name: str, hub: dict[str, Any]) -> Any:
    """What a folder or repository may hold for a model; None where it does not."""
    try:
        return auto_class.from_pretrained(name, **hub) if name else None
    except (OSError, ValueError):
        return None


def refuse_adapter(source: str | os.PathLike[str], **hub: Any) -> None:
    """Raise ValueError if a folder or repository that should hold a model holds an adapter."""
    source = os.fspath(source)
    config = find_adapter(source, hub)
    if config is None:
        return
    base = config.base_model_name_or_path
    raise ValueError(
        f"`model` must be a CLIP-style model, but {source!r} is an adapter of {base!r}: "
        "load it with `SageClassifier.from_pretrained`, or start from its base model."
    )


def save_classifier(classifier: Any, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of a classifier, or its head alone, as `PeftModel.save_pretrained` does."""
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"`folder` must be a folder, but {str(folder)!r} is a file.")
    configs = getattr(classifier, "peft_config", {})
    for name, config in (configs or {"default": _head_alone()}).items():
        if configs:
            state = get_peft_model_state_dict(
                classifier, adapter_name=name, save_embedding_layers=False
            )
        else:
            state = classifier.class_head.state_dict(prefix="class_head.")
        config = copy.copy(config)
        config.inference_mode = True
        config.base_model_name_or_path = classifier.name_or_path or None
        config.revision = config.revision or classifier.base_revision
        inside = target if name == "default" else target / name
        inside.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"base_model.model.{key}": value.detach().cpu().contiguous().clone()
            for key, value in state.items()
        }
        save_file(
            tensors, inside / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        kind = type(classifier)
        config.save_pretrained(
            str(inside),
            auto_mapping_dict={
                "base_model_class": kind.__name__,
                "parent_library": kind.__module__,
            },
        )


def absolute(name: str | None) -> str:
    """The name of a model, absolute where it is a folder, so that it is found from any working directory."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name or ""


def _head_alone() -> SageConfig:
    """The configuration of an adapter that consists of the head."""
    return SageConfig(
        target_modules=[],
        modules_to_save=["class_head"],
        guidance_rows=0,
        guidance_shape=[0, 0],
    )


def sample_weights(model: nn.Module) -> dict[str, Tensor]:
    """A few values of each weight of a model, which differ after training or merging."""
    samples = {}
    for name, weight in model.named_parameters():
        if not weight.is_meta and weight.numel():
            every = 1 + weight.numel() // 8
            samples[name] = weight.detach().flatten()[::every].cpu().clone()
    return samples


def has_changed(model: nn.Module, samples: dict[str, Tensor]) -> bool:
    """Whether a model has other weights than when [`sample_weights`] took these; a cast, and back, changes none."""
    for name, weight in sample_weights(model).items():
        before = samples.get(name, weight)
        types = before.dtype, torch.bfloat16, torch.float16
        if not any(torch.equal(before.to(t).to(weight), weight) for t in types):
            return True
    return False
