# SPDX-License-Identifier: Apache-2.0
"""How features vary within classes, and what that adds to the logits of the wrong ones."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
            self.reset()
            self.scatter = torch.zeros_like(scatter)
        # A batch that overflowed in half precision, of which the gradient scaler skips the step, leaves no trace.
        finite = scatter.isfinite().all()
        scatter = EMA_DECAY * self.scatter + scatter
        degrees = EMA_DECAY * self.degrees_of_freedom + degrees.float()
        self.scatter = scatter.where(finite, self.scatter)
        self.degrees_of_freedom = degrees.where(finite, self.degrees_of_freedom)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if f"{prefix}scatter" in state_dict:
            self.scatter = torch.zeros_like(
                state_dict[f"{prefix}scatter"], device=self.scatter.device
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def within_class_residuals(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, d) less the mean of their class in the batch, and their degrees of freedom: images less classes."""
    # (B, B) and not (K, d): the classes of a batch are few, and their number must not be looked at.
    same = ((labels[:, None] == labels) & (labels >= 0)).to(values.dtype)
    images = same.sum(dim=1, keepdim=True)
    counted = images > 0
    images = images.clamp(min=1)
    residuals = (values - same @ values / images).where(counted, 0)
    # Of a class with n images, each stands for 1 - 1 / n.
    return residuals, (1 - 1 / images).where(counted, 0).sum()


def compensation(
    rows: Tensor,
    covariance: Tensor | None,
    gamma: Tensor,
    labels: Tensor,
    features: Tensor | None = None,
) -> Tensor:
    """`gamma_y V_yk / 2` for rows `w_k` of a head, up to a constant of each image, which changes no softmax.

    With Sigma the covariance of the features, `V_yk = v_k + v_y - 2 w_y' Sigma w_k` and `v_k = w_k' Sigma w_k`; so
    this is `gamma_y v_k / 2 - gamma_y w_y' Sigma w_k`. Differentiable once, with respect to the rows.

    Args:
        rows: (..., K, e), in any number of heads at once.
        covariance: (e, e); the identity when None.
        gamma: (B,) of the images' labels.
        labels: (B,) class indices y.
        features: (B, e), whose logits `w_k f` are added.

    Returns:
        (..., B, K).
    """
    return _Compensation.apply(rows, covariance, gamma, labels, features)


class _Compensation(torch.autograd.Function):
    """With `P = W Sigma`, `u_i = f_i - gamma_i P_y` and G the gradient of the result, that of the rows is

        G' U + diag(G' gamma) P,    and for the row of each image's label -gamma_i (G P)_i

    which takes one product with Sigma, and one with the features and the rows of the labels together.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        covariance: Tensor | None,
        gamma: Tensor,
        labels: Tensor,
        features: Tensor | None,
    ) -> Tensor:
        projected = rows if covariance is None else rows @ covariance
        shifted = -gamma[:, None] * projected[..., labels, :]
        if features is not None:
            shifted = shifted + features
        ctx.save_for_backward(projected, shifted, gamma, labels)
        variance = (rows * projected).sum(dim=-1)[..., None, :]
        logits = shifted @ rows.mT
        return logits.addcmul_(gamma[:, None], variance, value=0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, shifted, gamma, labels = ctx.saved_tensors
        of_rows = grad.mT @ shifted
        of_rows.addcmul_((gamma @ grad)[..., None], projected)
        of_labels = gamma[:, None] * (grad @ projected)
        of_rows.index_add_(-2, labels, of_labels, alpha=-1)
        return of_rows, None, None, None, None


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
    batch = torch.cat(parts)
    return batch[:, :-1], batch[:, -1]
