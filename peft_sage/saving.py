# SPDX-License-Identifier: Apache-2.0
"""What a classifier leaves in a folder or repository, in PEFT's format, and what is found there."""

import copy
import os
from pathlib import Path
from typing import Any

from peft import (
    PeftConfig,
    get_peft_model_state_dict,
    load_peft_weights,
)
from safetensors.torch import save_file
from transformers.utils.peft_utils import find_adapter_config_file

from .config import SageConfig
from .head import read_extra_state


def find_adapter(source: str, **hub: Any) -> PeftConfig | None:
    """The configuration of the adapter in a folder or repository, None if it holds no adapter.

    Raises:
        ValueError: The folder holds nothing itself, but subfolders do.
    """
    if find_adapter_config_file(source, **hub):
        return PeftConfig.from_pretrained(source, **hub)
    folder = Path(source, hub.get("subfolder") or "")
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if inside and not (folder / "config.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds no adapter, but its subfolders {inside} do: name one by `subfolder`."
        )
    return None


def read_head(source: str, **hub: Any) -> dict[str, Any]:
    """What the `class_head` of a saved adapter knows in addition to its rows.

    Raises:
        ValueError: The adapter has no `class_head`.
    """
    for key, value in load_peft_weights(source, device="cpu", **hub).items():
        if key.endswith("class_head._extra_state"):
            return read_extra_state(value)
    raise ValueError(
        f"The adapter in {source!r} holds no `class_head`: it is not of a SageClassifier."
    )


def refuse_adapter(source: str | os.PathLike[str], **hub: Any) -> None:
    """Raise ValueError if a folder or repository that should hold a model holds an adapter."""
    source = os.fspath(source)
    if not find_adapter_config_file(source, **hub):
        return
    base = PeftConfig.from_pretrained(source, **hub).base_model_name_or_path
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
            head = classifier.class_head.state_dict()
            state = {f"class_head.{key}": value for key, value in head.items()}
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
