# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model get an adapter."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from . import towers
from .config import SageConfig
from .registration import PREFIX


def find_targets(model: nn.Module, config: SageConfig, state_dict: dict[str, torch.Tensor] | None = None) -> list[str]:
    """Find the modules that a configuration asks to adapt.

    Args:
        model: The model; it may already hold adapters.
        config: The configuration.
        state_dict: If given, its keys tell the modules instead, as in PEFT's `inject_adapter_in_model`.

    Returns:
        Names in the order of the model, which is the order of depth.

    Raises:
        ValueError: If nothing matches (the candidates are listed), a layer index is out of range, or a module does not
            map (..., d) to (..., d).
    """
    names = [name for name, _ in model.named_modules() if name and PREFIX not in name]
    if state_dict is not None:
        wanted = {key.partition(f".{PREFIX}")[0] for key in state_dict if f".{PREFIX}" in key}
        targets = [name for name in names if name in wanted]
    elif config.target_modules is None:
        targets = _select_layers(towers.find_blocks(model), config.layers_to_transform)
        targets = [name for name in targets if not is_excluded(config, name)]
    else:
        targets = [name for name in names if _matches(config, name)]
    if not targets:
        candidates = towers.candidate_modules(model)
        listed = f"Modules that could be adapted: {candidates}." if candidates else "No module could be adapted."
        raise ValueError(
            f"No module of {type(model).__name__} was matched by target_modules={config.target_modules!r}, "
            f"exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r}. {listed}"
        )
    for name in targets:
        try:
            towers.block_widths(model.get_submodule(name))
        except ValueError as error:
            raise ValueError(f"`target_modules` matches {name!r}, which cannot be adapted: {error}") from error
    return targets


def is_excluded(config: SageConfig, name: str) -> bool:
    """Tell whether `exclude_modules` or `modules_to_save` keeps a module from being adapted.

    Args:
        config: The adapter's configuration.
        name: The module's name in the model.

    Returns:
        Whether it is kept as it is.
    """
    return isinstance(check_target_module_exists(_as_peft(config), name), _ExcludedModule)


def _matches(config: SageConfig, name: str) -> bool:
    match = check_target_module_exists(_as_peft(config), name)
    return bool(match) and not isinstance(match, _ExcludedModule)


def _as_peft(config: SageConfig) -> SimpleNamespace:
    """The fields that PEFT's matching reads."""
    return SimpleNamespace(
        target_modules=config.target_modules if config.target_modules is not None else set(),
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )


def _select_layers(blocks: list[str], layers: int | list[int] | None) -> list[str]:
    if layers is None:
        return blocks
    layers = [layers] if isinstance(layers, int) else layers
    outside = [layer for layer in layers if not -len(blocks) <= layer < len(blocks)]
    if outside:
        raise ValueError(
            f"`layers_to_transform` must be within the {len(blocks)} blocks of the vision tower, got {outside}."
        )
    depths = {layer % len(blocks) for layer in layers}
    return [name for depth, name in enumerate(blocks) if depth in depths]
