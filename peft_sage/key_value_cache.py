# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the guidance, kept from one batch of an evaluation to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class _Kept(NamedTuple):
    guidance: torch.Tensor
    version: int
    autocast: torch.dtype | None
    weights: tuple[torch.Tensor, torch.Tensor]
    projected: tuple[torch.Tensor, torch.Tensor]


class KeyValueCache:
    """Keeps the projections of the guidance (M, e) to keys and values (M, r) of a block's adapters.

    It applies in evaluation mode, without gradients, in eager mode and on the CPU, where with thousands of classes and
    a few images the projections take longer than the attention; on an accelerator they are not worth the check. What
    is kept takes 2 M r numbers an adapter and block. It is used again if the guidance is the same tensor, not written
    to since, and both weights are equal number by number: a version counter would not tell what is written through
    `.data`. So results are those of projecting anew, bit for bit. `train()` and `eval()` drop it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def clear(self) -> None:
        """Drop everything that is kept."""
        self._kept = {}

    def project(
        self, adapter_name: str, guidance: torch.Tensor, key: nn.Linear, value: nn.Linear
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the guidance, unless that was done before.

        Args:
            adapter_name: Under which they are kept.
            guidance: (M, e).
            key: Projection to keys.
            value: Projection to values.

        Returns:
            Keys and values (M, r), those that were kept if nothing has changed.
        """
        if not _may_keep(guidance):
            return project(guidance, key, value)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        weights = key.weight, value.weight
        kept = self._kept.get(adapter_name)
        if (
            kept is not None
            and kept.guidance is guidance
            and kept.version == guidance._version
            and kept.autocast == autocast
            and all(_equal(*pair) for pair in zip(kept.weights, weights, strict=True))
        ):
            return kept.projected
        keys, values = project(guidance, key, value)
        if type(keys) is torch.Tensor:  # no stand-in for one, as shape propagation has
            copies = key.weight.detach().clone(), value.weight.detach().clone()
            self._kept[adapter_name] = _Kept(guidance, guidance._version, autocast, copies, (keys, values))
        return keys, values

    def __getstate__(self) -> dict[str, dict[str, _Kept]]:
        # Copies and files of the model go without.
        return {"_kept": {}}


def project(guidance: torch.Tensor, key: nn.Linear, value: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Project the guidance to keys and values.

    Args:
        guidance: (M, e).
        key: Projection to keys.
        value: Projection to values.

    Returns:
        Keys and values (M, r) in the projections' precision.
    """
    guidance = guidance.to(key.weight.dtype)
    return key(guidance), value(guidance)


def _may_keep(guidance: torch.Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and guidance.device.type == "cpu"
        and type(guidance) is torch.Tensor
        and not guidance.is_inference()  # such tensors do not count how often they were written to
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch._C._are_functorch_transforms_active()
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
