# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model a configuration asks to adapt."""

import warnings
from typing import Any

from torch import Tensor, nn

from ._peft_compat import is_target
from .config import SageConfig
from .registration import PREFIX
from .towers import mlps


def find_targets(
    model: nn.Module, config: SageConfig, state_dict: dict[str, Tensor] | None = None
) -> list[str]:
    """Find the modules that a configuration asks to adapt, in the order of depth.

    `state_dict`, if given, tells them by its keys instead, as in PEFT's `inject_adapter_in_model`.

    Raises:
        ValueError: Nothing matches (the candidates are listed), or only modules outside the vision tower; a layer
            index is out of range; or a module does not map (..., d) to (..., d).
    """
    names = [name for name, _ in model.named_modules() if name and PREFIX not in name]
    if state_dict is not None:
        keys = (key for key in state_dict if f".{PREFIX}" in key)
        wanted = {key.partition(f".{PREFIX}")[0] for key in keys}
        targets = [name for name in names if name in wanted]
    elif config.target_modules is None:
        blocks = _select_layers(mlps.find_mlps(model), config.layers_to_transform)
        targets = [name for name in blocks if is_target(config, name)]
    else:
        matching = [name for name in names if is_target(config, name)]
        targets = _within_tower(matching, model, config)
    head_alone = (
        config.target_modules is not None
        and not config.target_modules
        and config.modules_to_save
    )
    if not targets and not head_alone:
        raise ValueError(
            f"`target_modules`={config.target_modules!r} matches none of {mlps.candidate_modules(model)}."
        )
    for name in targets:
        try:
            mlps.mlp_widths(model.get_submodule(name))
        except ValueError as error:
            raise ValueError(
                f"`target_modules` matches {name!r}, which cannot be adapted: {error}"
            ) from error
    return targets


def _within_tower(names: list[str], model: nn.Module, config: SageConfig) -> list[str]:
    """Keep the modules of the vision tower; all, where the model has none that is known."""
    towers = mlps.find_towers(model)
    starts = tuple(f"{tower}." if tower else "" for tower in towers)
    inside = [name for name in names if not starts or name.startswith(starts)]
    outside = [name for name in names if name not in inside]
    if outside and not inside:
        raise ValueError(
            f"`target_modules`={config.target_modules!r} must match modules of the vision tower {towers}, "
            f"but matches only others, such as {outside[0]!r}."
        )
    if outside and not config.saved:
        warnings.warn(
            f"`target_modules`={config.target_modules!r} also matches {len(outside)} modules outside the vision "
            f"tower {towers}, such as {outside[0]!r}; they are not adapted.",
            stacklevel=2,
        )
    return inside


def _select_layers(blocks: list[str], layers: Any) -> list[str]:
    """Keep the blocks with these depths, negative ones counted from the end; all for None."""
    if layers is None:
        return blocks
    outside = [layer for layer in layers if not -len(blocks) <= layer < len(blocks)]
    if outside:
        raise ValueError(
            f"`layers_to_transform` must be within the {len(blocks)} blocks of the tower, got {outside}."
        )
    chosen = {layer % len(blocks) for layer in layers}
    return [blocks[depth] for depth in sorted(chosen)]
