# SPDX-License-Identifier: Apache-2.0
"""Attention to the guidance alone: how far it is from the speed of the tower's own products, and its rival."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from settings import Measurement, Settings
from timing import interleaved, row


def attention(settings: Settings) -> Measurement:
    """Operations a second of a block's attention, forward and backward, over those of the MLP's first product."""
    torch.manual_seed(0)
    tokens = settings.batch_size * ((settings.image_size // 16) ** 2 + 1)
    narrow = [_leaf(settings, rows, settings.r) for rows in (tokens, settings.large, settings.large)]
    wide = [_leaf(settings, tokens, settings.width), _leaf(settings, settings.width, 4 * settings.width)]
    seconds = interleaved(
        {
            "fused": _forward_backward(_fused, narrow),
            "explicit": _forward_backward(_explicit, narrow),
            "product": _forward_backward(torch.mm, wide),
        },
        settings,
    )
    # Two products forward and five backward, of which one repeats what the kernel did not keep; the MLP's has three.
    attended = 7 * 2 * tokens * settings.large * settings.r
    multiplied = 3 * 2 * tokens * settings.width * 4 * settings.width
    what = f"attention of a block to C = {settings.large:,} rows"
    speed = attended / seconds["fused"] / (multiplied / seconds["product"])
    giga = multiplied / float(np.median(seconds["product"])) / 1e9
    return [
        row(f"{what}: operations a second / the MLP product's", speed, note=f"the product: {giga:.0f} GFLOP/s"),
        row(f"{what}: explicit softmax / fused kernel", seconds["explicit"] / seconds["fused"]),
    ], []


def _leaf(settings: Settings, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=settings.device).requires_grad_()


def _fused(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(queries[None, None], keys[None, None], values[None, None])[0, 0]


def _explicit(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (queries @ keys.T / queries.shape[-1] ** 0.5).softmax(dim=-1) @ values


def _forward_backward(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    gradient = torch.ones_like(function(*leaves))

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, gradient)

    return run
