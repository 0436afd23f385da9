# SPDX-License-Identifier: Apache-2.0
"""The distribution-mismatch-aware loss of Sage (arXiv 2507.12807): a drop-in for `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .mismatch import chunk_rows, mismatch_from_counts
from .validation import as_numbers, check_class_counts, check_labels


class SageLoss(nn.Module):
    """Cross-entropy for long-tailed training data, corrected for the class prior and the distribution mismatch.

    With the training prior `pi_k = n_k / n`, the target prior `q_k` and the mismatch `delta_k >= 0` of a class,

        L(z, y) = -log softmax_y( z + adjustment - lambda delta_y e_y ),    adjustment_k = tau (log pi_k - log q_k)

    where `e_y` is the unit vector of the right class. A training image took part in what was learned of its class, a
    new one did not: on new images the right logit is lower, on average by `delta_y` (an optimism in nats, as in AIC),
    and the other logits are not. With `lambda delta_y` taken from the right logit the training loss stands for that of
    new images. The fewer images a class has, the larger its `delta_y`. At test time the logits are used as they are.
    Special cases: `tau = lambda = 0` is cross-entropy; `tau = 1, lambda = 0` the logit-adjusted loss (Menon et al.
    2021) or balanced softmax (Ren et al. 2020).

    `delta_k` is `base_mismatch`, for what no training image of any class shows, and what `mismatch` says of the class.

    The loss is computed in float32 (float64 for float64 logits), whatever the type of the logits, and follows the
    logits to their device. Its buffers stay float32 under `.half()` and `.bfloat16()`. `mismatch` belongs to the
    state dict, so that a resumed run goes on with the mismatch that was measured last.

    It can be handed to `transformers.Trainer` as it is: `Trainer(..., compute_loss_func=SageLoss(class_counts))`. Note
    that Trainer's `eval_loss` is then this loss too, adjustment included; judge a model by its accuracies.

    For logits in half precision, class indices and no label smoothing, nothing of the logits' size is kept in float32
    for the backward pass; that case cannot be differentiated twice. With thousands of classes, `torch.compile(loss)`
    is faster: it fuses the float32 arithmetic into fewer passes.

    Args:
        class_counts: (K,) numbers of training images. A class without images counts as one with a single image.
        tau: strength of the prior correction.
        compensation: lambda, strength of the mismatch compensation.
        mismatch: `"counts"` for `mismatch_from_counts(class_counts, effective_dim)`, or a (K,) tensor of mismatches in
            nats, such as `estimate_mismatch` gives.
        target_prior: (K,) class probabilities of the target data; uniform when None.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1].
        ignore_index: label of the images that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.
        effective_dim: effective dimension of the estimate from counts; without effect when `mismatch` is a tensor.
        base_mismatch: mismatch of every class in nats, which is added to `mismatch`; 2 nats are a cosine of 0.08 under
            a head of scale 25.

    Attributes:
        adjustment: (K,) float32 buffer, what is added to the logits: the correction for the prior.
        mismatch: (K,) float32 buffer, `delta` in nats, of which the right logit loses `compensation` times as much.

    Raises:
        ValueError: an argument has a wrong value or shape.
        TypeError: an argument has a wrong type.

    Reference: the compensation is the paper's (arXiv 2507.12807); its formula, restated above, is ours. Its defaults
    are within the noise of the best on a validation split (RESULTS.md, `benchmarks/longtail/experiments/losses.yaml`),
    which chose its form: taking `delta_k` from the logit of every class, whatever the label, gained nothing.

    Example:
        >>> loss = SageLoss([500, 50, 5])
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    adjustment: torch.Tensor
    mismatch: torch.Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | torch.Tensor,
        tau: float = 1.0,
        compensation: float = 1.0,
        mismatch: Literal["counts"] | torch.Tensor = "counts",
        target_prior: Sequence[float] | torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        effective_dim: float = 32.0,
        base_mismatch: float = 2.0,
    ) -> None:
        super().__init__()
        for name, value in (("tau", tau), ("compensation", compensation)):
            if not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
        if not (math.isfinite(base_mismatch) and base_mismatch >= 0):
            raise ValueError(f"`base_mismatch` must be a finite number, at least 0, got {base_mismatch}.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1], got {label_smoothing}.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.')
        if isinstance(mismatch, str) and mismatch != "counts":
            raise ValueError(f'`mismatch` must be "counts" or a (K,) tensor, got {mismatch!r}.')
        self.tau = tau
        self.base_mismatch = base_mismatch
        self.compensation = compensation
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction

        counts = check_class_counts(class_counts).double().clamp(min=1)
        log_prior = (counts / counts.sum()).log()
        log_target = _check_target_prior(target_prior, len(counts)).log()
        self.register_buffer("adjustment", (tau * (log_prior - log_target)).float(), persistent=False)
        self.register_buffer("mismatch", torch.zeros_like(self.adjustment))
        self.set_mismatch(mismatch_from_counts(class_counts, effective_dim) if isinstance(mismatch, str) else mismatch)

    @classmethod
    def from_labels(cls, labels: Sequence[int] | torch.Tensor, num_classes: int, **kwargs: Any) -> SageLoss:
        """Counts the training labels and builds the loss.

        Args:
            labels: (N,) class indices of the training images.
            num_classes: K.
            **kwargs: the other arguments of `SageLoss`.

        Returns:
            The loss for these class counts.

        Raises:
            ValueError: a label is out of range, or `labels` is not one-dimensional.
            TypeError: the labels are not integers.
        """
        labels = as_numbers(labels, "labels").cpu()
        if labels.ndim != 1:
            raise ValueError(f"`labels` must have shape (N,), got {tuple(labels.shape)}.")
        check_labels(labels, num_classes)
        return cls(torch.bincount(labels, minlength=num_classes), **kwargs)

    def set_mismatch(self, mismatch: torch.Tensor) -> None:
        """Replaces the mismatch, for example by one measured anew on the adapted features after each epoch.

        Args:
            mismatch: (K,) in nats, finite and not negative.

        Raises:
            ValueError: another shape, or a value that is negative or not finite.
            TypeError: `mismatch` does not hold numbers.
        """
        delta = as_numbers(mismatch, "mismatch").to(self.adjustment)
        if delta.shape != self.adjustment.shape:
            raise ValueError(
                f"`mismatch` must have shape {tuple(self.adjustment.shape)}, one value a class, "
                f"got {tuple(delta.shape)}."
            )
        if not (delta.isfinite() & (delta >= 0)).all():
            raise ValueError(f"`mismatch` must be finite and not negative, got {delta}.")
        self.mismatch = self.base_mismatch + delta

    def forward(
        self,
        outputs: torch.Tensor | Mapping[str, Any] | Sequence[Any],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Computes the loss.

        Args:
            outputs: (B, K) logits, or what a model returned: a `ModelOutput` or mapping with `logits`, or a tuple that
                starts with them.
            labels: (B,) class indices, or (B, K) probabilities (mixup, soft labels), with which the logit of a class
                loses its mismatch in proportion to its probability. On the CPU an index out of range
                raises; on an accelerator the kernel asserts it, since a check here would stall every step.
            num_items_in_batch: Trainer's number of label elements in all batches of an optimizer step (so `B * K` for
                probabilities). If given, the sum of the losses is divided by the number of images that it stands for,
                whatever the `reduction`; with gradient accumulation that gives the loss of the whole batch.

        Returns:
            A scalar, or (B,) for `reduction="none"`; float32, or float64 for float64 logits.

        Raises:
            ValueError: logits or labels of another shape or number of classes, or a label out of range.
            TypeError: no tensor of logits or labels, or labels of the wrong type.
        """
        logits = _logits(outputs)
        num_classes = len(self.adjustment)
        if logits.ndim != 2 or logits.shape[1] != num_classes:
            raise ValueError(f"`logits` must have shape (B, {num_classes}), got {tuple(logits.shape)}.")
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"`labels` must be a tensor, got {type(labels).__name__}.")
        soft = labels.is_floating_point() and labels.shape == logits.shape
        if not soft:
            if labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"`labels` must be {len(logits)} class indices or probabilities of shape {tuple(logits.shape)}, "
                    f"got {labels.dtype} of shape {tuple(labels.shape)}."
                )
            check_labels(labels, num_classes, self.ignore_index)

        if self.adjustment.device != logits.device and not torch.compiler.is_compiling():
            self.to(logits.device)  # Trainer moves the model, but not its loss
        reduction = self.reduction if num_items_in_batch is None else "sum"
        labels = labels.to(logits.device)
        compensation = self.compensation * self.mismatch.to(logits.device)
        if logits.element_size() > 2 or soft or self.label_smoothing or torch.compiler.is_compiling():
            # At least float32 by type promotion, without a float32 copy of the logits beside the sum.
            adjusted = logits + self.adjustment.to(logits.device)
            labels = labels.to(adjusted.dtype if soft else torch.long)
            if soft:
                adjusted = adjusted - labels * compensation
            else:
                label = labels.clamp(0, num_classes - 1)  # that of an ignored image is any class
                adjusted = adjusted.scatter_add_(1, label[:, None], -compensation[label][:, None].to(adjusted.dtype))
            loss = F.cross_entropy(
                adjusted,
                labels,
                ignore_index=-100 if soft else self.ignore_index,
                reduction=reduction,
                label_smoothing=self.label_smoothing,
            )
        else:
            counted = labels != self.ignore_index
            label = labels.long().where(counted, 0)
            needs_grad = logits.requires_grad and torch.is_grad_enabled()
            loss, _ = _HalfPrecisionLoss.apply(logits, self.adjustment, label, compensation[label], needs_grad)
            loss = loss.where(counted, 0)
            loss = loss if reduction == "none" else loss.sum()
            loss = loss / counted.sum() if reduction == "mean" else loss
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss * (num_classes if soft else 1) / num_items_in_batch

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SageLoss:
        # Follow `.to(device)`, but keep float32: rounding the adjustment would bias every logit of a class alike.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def extra_repr(self) -> str:
        """Return what `repr` shows of the loss."""
        return (
            f"num_classes={len(self.adjustment)}, tau={self.tau}, compensation={self.compensation}, "
            f"base_mismatch={self.base_mismatch}, "
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


# 1 MiB in float32: some rows of the logits stay in the processor's cache between the steps. Elsewhere as many as it
# takes for starting the steps to take no time.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ACCELERATOR = 2**18, 2**25


class _HalfPrecisionLoss(torch.autograd.Function):
    """-log softmax_y(z + adjustment - c e_y) of each image (B,) in float32, for logits (B, K) in half precision.

    The derivative, the softmax less onehot(y), is computed along with it, some rows at a time, and kept in the
    logits' precision: as much memory as `F.cross_entropy` keeps, where a sum in float32 would take twice as much.
    """

    @staticmethod
    def forward(
        logits: torch.Tensor,
        adjustment: torch.Tensor,
        labels: torch.Tensor,
        compensation: torch.Tensor,
        needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = min(chunk_rows(logits, _CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ACCELERATOR), max(1, len(logits)))
        losses = adjustment.new_empty(len(logits), 1)
        derivative = torch.empty_like(logits if needs_grad else logits[:0])
        # Written to again and again: new memory for each step would cost as much as the step.
        sums, shares = adjustment.new_empty(2, size, logits.shape[1])
        minus_one = adjustment.new_full((size, 1), -1.0)
        for start in range(0, len(logits), size):
            rows, label = logits[start : start + size], labels[start : start + size, None]
            adjusted, share = sums[: len(rows)].copy_(rows).add_(adjustment), shares[: len(rows)]
            adjusted.scatter_add_(1, label, -compensation[start : start + size, None])
            torch.softmax(adjusted, 1, out=share)
            # The largest logit's share tells the denominator; the label's own may have underflowed.
            log_denominator = adjusted.amax(1, keepdim=True) - share.amax(1, keepdim=True).log_()
            losses[start : start + size] = log_denominator - adjusted.gather(1, label)
            if needs_grad:
                derivative[start : start + size] = share.scatter_add_(1, label, minus_one)
        return losses.squeeze(1), derivative

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`SageLoss` of half-precision logits has no second derivative; give it `logits.float()`."
            )
        (derivative,) = ctx.saved_tensors
        size = chunk_rows(derivative, _CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ACCELERATOR)
        result = torch.empty_like(derivative)
        for rows, out, factor in zip(derivative.split(size), result.split(size), grad.split(size), strict=True):
            torch.mul(rows, factor[:, None], out=out)
        return result, None, None, None, None


def _logits(outputs: torch.Tensor | Mapping[str, Any] | Sequence[Any]) -> torch.Tensor:
    """Takes the logits out of what a model returned."""
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(f"`outputs` must have `logits`, got only {sorted(outputs)}.")
        outputs = outputs["logits"]
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise TypeError(f"`logits` must be a floating-point tensor, got {kind}.")
    return outputs


def _check_target_prior(target_prior: Sequence[float] | torch.Tensor | None, num_classes: int) -> torch.Tensor:
    """Reads the target prior as (K,) float64 probabilities on the CPU, or says what is wrong with it."""
    if target_prior is None:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    prior = as_numbers(target_prior, "target_prior").cpu().double()
    if prior.shape != (num_classes,):
        raise ValueError(f"`target_prior` must have shape ({num_classes},), got {tuple(prior.shape)}.")
    if not (prior > 0).all() or abs(prior.sum() - 1) > 1e-4:
        raise ValueError(
            "`target_prior` must be positive probabilities that sum to 1 (give a class that may be absent a small "
            f"one), got a sum of {prior.sum():.6g} and a smallest value of {prior.min():.6g}."
        )
    return prior
