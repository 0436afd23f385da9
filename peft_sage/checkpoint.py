# SPDX-License-Identifier: Apache-2.0
"""Checks between an adapter's weights file and the model that it is loaded on."""

from __future__ import annotations

import re

import torch
from torch import nn

from .layer import SageLayer
from .registration import PREFIX


PEFT_ROOT = "base_model.model."


def align_block_names(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename the blocks in a weights file to those of the model that holds the same tower.

    An adapter trained on `CLIPModel` has `vision_model.encoder.layers.0.mlp` where `CLIPVisionModel` has
    `encoder.layers.0.mlp`, and a classifier around either has a prefix more.

    Args:
        model: The model, with the adapter in place.
        adapter_name: The adapter's name.
        state_dict: The file's content.

    Returns:
        The content under the model's names.

    Raises:
        ValueError: If the blocks do not correspond one to one.
    """
    in_model = sorted(
        (
            name.removeprefix(PEFT_ROOT)
            for name, module in model.named_modules()
            if isinstance(module, SageLayer) and adapter_name in module.peft_sage_down
        ),
        key=_natural,
    )
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


def check_complete(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Check that a weights file holds exactly what the adapter needs.

    Args:
        model: The model, with the adapter in place.
        adapter_name: The adapter's name.
        state_dict: The file's content under the model's names.

    Raises:
        ValueError: If a tensor is missing, is not expected, has another shape, or holds NaN or infinity.
    """
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if f".{PREFIX}" in key and (f".{adapter_name}." in key or key.endswith(f".{adapter_name}"))
    }
    found = {key: value for key, value in state_dict.items() if f".{PREFIX}" in key}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"The adapter's weights do not fit its configuration: missing from the file {_some(missing)}, not "
            f"expected in it {_some(unknown)}."
        )
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"The adapter's weights do not fit its configuration: {key!r} has the shape {tuple(value.shape)} in "
                f"the file, expected {tuple(expected[key].shape)}."
            )
        if not value.is_meta and not torch.isfinite(value).all():
            raise ValueError(f"The adapter's weights are damaged: {key!r} holds NaN or infinity.")


def _block(key: str) -> str:
    return key[: key.index(f".{PREFIX}")].removeprefix(PEFT_ROOT)


def _same_block(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{names[:4]}{more}"
