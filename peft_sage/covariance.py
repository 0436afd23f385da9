# SPDX-License-Identifier: Apache-2.0
"""How features vary within classes, and what that adds to the logits of the wrong ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


#: Decay of the moving average per batch.
EMA_DECAY = 0.95


class WithinClassCovariance(nn.Module):
    """Pooled covariance of features within classes: a moving average over batches, of all processes together.

    A batch counts by its degrees of freedom, images less classes.
    """

    scatter: Tensor
    degrees_of_freedom: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scatter", torch.zeros(0, 0))
        self.register_buffer("degrees_of_freedom", torch.zeros(()))

    @property
    def matrix(self) -> Tensor:
        """(e, e); zeros as long as no class had two images in a batch."""
        return self.scatter / self.degrees_of_freedom.clamp(min=1e-6)

    def reset(self) -> None:
        """Forget the batches so far."""
        self.scatter = self.scatter.new_zeros(0, 0)
        self.degrees_of_freedom = torch.zeros_like(self.degrees_of_freedom)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features (B, e); images of label -1 are ignored.

        All processes must call it together, whatever their batches hold.
        """
        residuals, degrees = within_class_residuals(*_gather(features, labels))
        scatter = residuals.T @ residuals
        if self.scatter.shape != scatter.shape:
            self.scatter = torch.zeros_like(scatter)
            self.degrees_of_freedom = torch.zeros_like(self.degrees_of_freedom)
        # A batch that overflowed in half precision, of which the gradient scaler skips the step, leaves no trace.
        finite = scatter.isfinite().all()
        self.scatter = torch.where(
            finite, EMA_DECAY * self.scatter + scatter, self.scatter
        )
        self.degrees_of_freedom = torch.where(
            finite,
            EMA_DECAY * self.degrees_of_freedom + degrees.float(),
            self.degrees_of_freedom,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if f"{prefix}scatter" in state_dict:
            self.scatter = torch.zeros_like(
                state_dict[f"{prefix}scatter"], device=self.scatter.device
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "WithinClassCovariance":
        # Follow `.to(device)`, but keep the precision.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def within_class_residuals(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, d) less the mean of their class in the batch, and their degrees of freedom: images less classes."""
    # (B, B) and not (K, d): the classes of a batch are few, and their number must not be looked at.
    same = ((labels[:, None] == labels) & (labels >= 0)).to(values.dtype)
    images = same.sum(dim=1, keepdim=True)
    residuals = torch.where(images > 0, values - same @ values / images.clamp(min=1), 0)
    return residuals, torch.where(images > 0, 1 - 1 / images.clamp(min=1), 0).sum()


def compensate(
    logits: Tensor, gamma: Tensor, variance: Tensor, factor: Tensor, rows: Tensor
) -> Tensor:
    """Logits (..., B, K) plus `gamma_y V_yk / 2`, up to a constant of each image, which changes no softmax.

    Logits `z_k = w_k f` with features of covariance Sigma have `V_yk = v_k + v_y - 2 w_y' Sigma w_k`, so this is
    `z_k + gamma_y v_k / 2 - gamma_y w_y' Sigma w_k`.

    Args:
        logits: (..., B, K).
        gamma: (B,) of the images' labels y.
        variance: (..., K) `v_k = w_k' Sigma w_k`.
        factor: (..., B, d) and
        rows: (..., K, d), whose product is `w_y' Sigma w_k`.
    """
    gamma = gamma[:, None]
    shifted = torch.addcmul(logits, gamma, variance[..., None, :] / 2)
    return shifted - (gamma * factor) @ rows.mT


def _gather(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batches of all processes as one; shorter batches are padded with label -1."""
    distributed = dist.is_available() and dist.is_initialized()
    if not distributed or dist.get_world_size() == 1:
        return features, labels
    size = torch.tensor(len(features), device=features.device)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    batch = torch.cat([features, labels[:, None]], dim=1)
    batch = F.pad(batch, (0, 0, 0, int(size) - len(features)), value=-1)
    parts = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, batch)
    return torch.cat(parts)[:, :-1], torch.cat(parts)[:, -1]
