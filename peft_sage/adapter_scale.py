# SPDX-License-Identifier: Apache-2.0
"""How much of the adapters' update to keep, chosen on validation images after training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


#: What the adapters' output is multiplied with.
SCALES = (1.0, 0.5, 0.0)
#: Within half a point of the best score the smallest scale is chosen: it departs less from the frozen tower,
#: which is better on rare classes (RESULTS.md).
TOLERANCE = 0.005


@dataclass(frozen=True)
class AdapterScale:
    """What was chosen.

    Attributes:
        scale: What the adapters' output was multiplied with.
        scores: The validation score of each scale that was tried.
    """

    scale: float
    scores: dict[float, float]

    def __str__(self) -> str:
        tried = ", ".join(
            f"{x:g}: {100 * score:.1f}%" for x, score in self.scores.items()
        )
        return f"adapter scale {self.scale:g} (on validation images: {tried})"


@torch.no_grad()
def choose_adapter_scale(
    outputs: Sequence[Tensor],
    head: Tensor,
    frozen_head: Tensor | None,
    score: Callable[[], float],
) -> AdapterScale:
    """Scale the adapters by 1, 0.5 or 0, in place: by the smallest whose score is within half a point of the best.

    Args:
        outputs: The weights and biases of the adapters' last layers.
        head: (K, e) the weight of the trained head.
        frozen_head: (K, e) a head for the frozen tower, which goes with the scale 0; without it 0 is not tried.
        score: Evaluates the model as it is, in [0, 1]; higher is better.
    """
    trained = [weights.clone() for weights in (*outputs, head)]

    def set_scale(scale: float) -> None:
        for weights, values in zip(outputs, trained, strict=False):
            weights.copy_(values * scale)
        rows = trained[-1]
        if frozen_head is not None and not scale:
            rows = frozen_head
        head.copy_(rows)

    scores = {}
    for scale in SCALES if frozen_head is not None else SCALES[:-1]:
        set_scale(scale)
        scores[scale] = score()
    enough = max(scores.values()) - TOLERANCE
    chosen = min(scale for scale, value in scores.items() if value >= enough)
    set_scale(chosen)
    return AdapterScale(chosen, scores)
