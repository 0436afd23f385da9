# SPDX-License-Identifier: Apache-2.0
"""How much of the adapters' update to keep, chosen on validation images after training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


#: The adapters' update is halved unless the score falls by more: what departs less from the frozen tower is better on
#: rare classes (RESULTS.md).
TOLERANCE = 0.005


@dataclass(frozen=True)
class AdapterScale:
    """What was chosen.

    Attributes:
        scale: What the adapters' output was multiplied with: 1 or 0.5.
        scores: The validation score of each scale.
    """

    scale: float
    scores: dict[float, float]


def adapter_outputs(model: nn.Module) -> list[Tensor]:
    """The trained weights and biases of the adapters' last layers."""
    return [
        weights
        for name, weights in model.named_parameters()
        if "peft_sage_up" in name and weights.requires_grad
    ]


@torch.no_grad()
def choose_adapter_scale(
    outputs: Sequence[Tensor], whole: float, score: Callable[[], float]
) -> AdapterScale:
    """Halve the adapters' update in place, unless the score falls by more than half a point.

    Args:
        outputs: [`adapter_outputs`] of the model.
        whole: The score of the model as it is, in [0, 1]; higher is better.
        score: Evaluates the model.
    """
    for weights in outputs:
        weights.mul_(0.5)
    half = score()
    keeps_whole = half < whole - TOLERANCE
    for weights in outputs if keeps_whole else ():
        weights.mul_(2)
    return AdapterScale(1.0 if keeps_whole else 0.5, {1.0: whole, 0.5: half})
