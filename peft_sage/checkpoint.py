# SPDX-License-Identifier: Apache-2.0
"""What an adapter's weights file must hold, checked before a model is changed."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import nn

from . import towers
from .config import WEIGHTS_NAMES, SageConfig
from .layer import SageLayer
from .registration import PREFIX


PEFT_ROOT = "base_model.model."


def check_source(model: nn.Module, config: SageConfig, targets: list[str], r: int) -> None:
    """Check that the weights of a saved adapter can be loaded on a model that does not hold the adapter yet.

    Args:
        model: The model.
        config: The configuration that [`SageConfig.from_pretrained`] read beside the weights.
        targets: Names of the modules that it asks to adapt.
        r: Width of the bottleneck.

    Raises:
        ValueError: If the file is missing or damaged, or does not fit the configuration or the model.
    """
    assert config.source is not None
    found = read_weights(*config.source)
    expected = {**_adapter_tensors(model, config, targets, r), **_saved_module_tensors(model, config)}
    check_complete(align_block_names(found, targets), expected, config)


def read_weights(model_id: str, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read an adapter's weights file.

    Args:
        model_id: Folder or repository on the Hub, as PEFT takes it.
        hub_kwargs: Further arguments for the download, such as `subfolder` and `revision`.

    Returns:
        The file's content, on the CPU.

    Raises:
        ValueError: If there is no such file, or it is damaged.
    """
    folder = os.path.join(model_id, hub_kwargs.get("subfolder") or "")
    if os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, name)) for name in WEIGHTS_NAMES):
        raise ValueError(f"The folder {folder!r} holds the configuration of an adapter, but no {WEIGHTS_NAMES[0]!r}.")
    try:
        weights = load_peft_weights(model_id, device="cpu", **hub_kwargs)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"The adapter's weights file in {folder!r} is damaged and was not loaded: {error}. Restore it from a copy "
            "or save the adapter again."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"The adapter's weights file in {folder!r} is damaged: it does not hold named tensors.")
    return weights


def adapted_blocks(model: nn.Module, adapter_name: str) -> list[str]:
    """Return where an adapter sits.

    Args:
        model: A model with the adapter, wrapped or not.
        adapter_name: The adapter's name.

    Returns:
        Names of the modules that hold the adapter, in depth order, without PEFT's prefix.
    """
    return [
        name.removeprefix(PEFT_ROOT)
        for name, module in model.named_modules()
        if isinstance(module, SageLayer) and adapter_name in module.peft_sage_down
    ]


def align_block_names(state_dict: dict[str, torch.Tensor], blocks: Iterable[str]) -> dict[str, torch.Tensor]:
    """Rename the blocks in a weights file to those of the model that holds the same tower.

    An adapter trained on `CLIPModel` has `vision_model.encoder.layers.0.mlp` where `CLIPVisionModel` has
    `encoder.layers.0.mlp`, and a classifier around either has a prefix more.

    Args:
        state_dict: The file's content.
        blocks: Names of the adapted modules of the model.

    Returns:
        The content under the model's names.

    Raises:
        ValueError: If the blocks do not correspond one to one.
    """
    in_model = sorted(blocks, key=_natural)
    in_file = sorted({_block(key) for key in state_dict if f".{PREFIX}" in key}, key=_natural)
    if in_file == in_model:
        return state_dict
    fits = len(in_file) == len(in_model) and all(map(_same_block, in_file, in_model))
    if not fits:
        raise ValueError(
            f"The adapter's weights do not fit the model: the file has {len(in_file)} adapted blocks, "
            f"{_some(in_file)}, the model has {len(in_model)}, {_some(in_model)}. Was it trained on another model, or "
            "with other `target_modules`?"
        )
    renamed = dict(zip(in_file, in_model, strict=True))
    return {
        PEFT_ROOT + renamed[_block(key)] + key[key.index(f".{PREFIX}") :] if f".{PREFIX}" in key else key: value
        for key, value in state_dict.items()
    }


def check_complete(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], config: SageConfig) -> None:
    """Check that a weights file holds exactly what an adapter needs.

    Args:
        found: The file's content.
        expected: Tensors of the right shapes, under the same names.
        config: The adapter's configuration.

    Raises:
        ValueError: If a tensor is missing, is not expected, has another shape, or holds NaN or infinity; or if the
            number of attention heads differs.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(key for key in found.keys() - expected.keys() if f".{PREFIX}" in key)
    if missing or unknown:
        raise ValueError(
            f"The adapter's weights do not fit its configuration: missing from the file {_some(missing)}, not "
            f"expected in it {_some(unknown)}."
        )
    for key, value in expected.items():
        if value.shape != found[key].shape:
            raise ValueError(
                f"The adapter's weights do not fit its configuration or the model: {key!r} has the shape "
                f"{tuple(found[key].shape)} in the file, expected {tuple(value.shape)}."
            )
        if f".{PREFIX}num_heads" in key and found[key].item() != config.num_heads:
            raise ValueError(
                f"The adapter's weights do not fit its configuration: they were trained with {found[key].item()} "
                f"attention heads, the configuration has num_heads={config.num_heads}."
            )
        if found[key].is_floating_point() != value.is_floating_point():
            raise ValueError(f"The adapter's weights are damaged: {key!r} has the type {found[key].dtype}.")
        if not found[key].is_meta and not torch.isfinite(found[key]).all():
            raise ValueError(f"The adapter's weights are damaged: {key!r} holds NaN or infinity.")


def _adapter_tensors(model: nn.Module, config: SageConfig, targets: list[str], r: int) -> dict[str, torch.Tensor]:
    """The adapter's tensors as a weights file names them, without their content."""
    config = copy.copy(config)
    config.r = r
    tensors = {}
    name = "adapter"
    with torch.device("meta"):
        owner = (
            BufferDict({name: torch.empty(config.guidance_shape or (0, 0))}, persistent=True)
            if config.num_classes
            else None
        )
        for target in targets:
            width, out_width = towers.block_widths(model.get_submodule(target))
            layer = SageLayer(nn.Identity(), width, out_width=out_width)
            if target == targets[0] and owner is not None:
                layer.peft_sage_guidance[name] = owner[name]
            layer.update_layer(name, config, owner)
            for key, value in layer.state_dict().items():
                tensors[f"{PEFT_ROOT}{target}.{key.replace(f'.{name}', '')}"] = value
    return tensors


def _saved_module_tensors(model: nn.Module, config: SageConfig) -> dict[str, torch.Tensor]:
    """Tensors of the modules in `modules_to_save`, as a weights file names them."""
    tensors = {}
    for name, module in model.named_modules():
        # The rule of PEFT, which wraps these modules.
        if any(name.endswith(ending) for ending in config.modules_to_save or []):
            module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            tensors.update({f"{PEFT_ROOT}{name}.{key}": value for key, value in module.state_dict().items()})
    return tensors


def _block(key: str) -> str:
    return key[: key.index(f".{PREFIX}")].removeprefix(PEFT_ROOT)


def _same_block(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{names[:4]}{more}"
