# SPDX-License-Identifier: Apache-2.0
"""The loss of Sage (arXiv 2507.12807): logit adjustment, compensation of the mismatch, and a pull to the texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .validation import as_numbers, check_class_counts, check_labels, check_number


#: How much of what was seen of the covariance before stays after a batch.
MEMORY = 0.95


class SageLoss(nn.Module):
    """Cross-entropy for long-tailed training data: `SageLoss(class_counts)(logits, labels)`.

        L_i = -log softmax_y( z_i + adjustment + gamma_y V_y / 2 ),    adjustment_k = tau (log pi_k - log q_k)
              + text_prior mean_k (1 - cos(w_k, t_k))
              + text_guidance KL( softmax(s f0_i T') || softmax(s f_i T') )

    The adjustment for the training prior `pi` and the target prior `q` is that of arXiv 2007.07314. The compensation:
    new images of class y lie further from what was learned of it than its training images do, by noise of covariance
    `gamma_y Sigma`, with `gamma_y = compensation (0.4 + 8 / n_y)` and Sigma the pooled covariance within the classes.
    The expected loss under that noise is at most the one above (ISDA, arXiv 1909.12220; for long tails MetaSAug,
    arXiv 2103.12579), where `V_yk` is the variance of `z_k - z_y` within the classes. `w` are the rows of the head,
    `t` and `T` the frozen text embeddings, `f` and `f0` the image embeddings of the adapted and of the frozen tower.

    Of a mapping with `logits`, `image_embeds` (B, e), `class_embeds` (K, e) and `logit_scale`, where `logits` are
    `logit_scale image_embeds class_embeds'`, Sigma is a moving average over batches and processes. Of logits alone, V
    is measured in the batch of the process, from classes with two images in it; without any it is zero. In evaluation
    (`eval()` or without gradients), and for soft labels, only the adjustment is applied. The arithmetic is float32, or
    float64 for float64 logits.

    Args:
        class_counts: (K,) numbers of training images. A class without images counts as one with a single image.
        tau: strength of the adjustment. With `tau` and `compensation` 0 the loss is cross-entropy.
        compensation: factor of gamma.
        text_prior: strength of the pull on the head, as [`choose_text_prior`] finds it. Needs `class_embeds` and
            `text_embeds` (K, e).
        text_guidance: strength of the pull on the tower. Needs `image_embeds`, `text_embeds`, `logit_scale` and
            `base_image_embeds` (B, e).
        target_prior: (K,) class probabilities of the target data; uniform when None.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1].
        ignore_index: label of the images that do not count.
        reduction: `"mean"`, `"sum"` or `"none"`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, or a wrong value or shape.
    """

    adjustment: torch.Tensor
    gamma: torch.Tensor
    scatter: torch.Tensor
    degrees: torch.Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | torch.Tensor,
        tau: float = 1.0,
        compensation: float = 1.0,
        text_prior: float = 0.0,
        text_guidance: float = 0.0,
        target_prior: Sequence[float] | torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_number("tau", tau)
        check_number("label_smoothing", label_smoothing, 0, 1)
        for name, value in {
            "compensation": compensation,
            "text_prior": text_prior,
            "text_guidance": text_guidance,
        }.items():
            check_number(name, value, 0)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.')
        self.tau, self.compensation, self.text_prior, self.text_guidance = tau, compensation, text_prior, text_guidance
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction
        counts = check_class_counts(class_counts).double().clamp(min=1)
        log_target = _check_target_prior(target_prior, len(counts)).log()
        adjustment = tau * ((counts / counts.sum()).log() - log_target)
        self.register_buffer("adjustment", adjustment.float(), persistent=False)
        self.register_buffer("gamma", (compensation * (0.4 + 8 / counts)).float(), persistent=False)
        # The sum of squares within classes, and its degrees of freedom: batches count by how many pairs they hold.
        self.register_buffer("scatter", torch.zeros(0, 0))
        self.register_buffer("degrees", torch.zeros(()))

    @classmethod
    def from_labels(cls, labels: Sequence[int] | torch.Tensor, num_classes: int, **kwargs: Any) -> SageLoss:
        """The loss for the class counts of the training labels (N,), with the further arguments of [`SageLoss`]."""
        labels = as_numbers(labels, "labels").cpu()
        if labels.ndim != 1:
            raise ValueError(f"`labels` must have shape (N,), got {tuple(labels.shape)}.")
        check_labels(labels, num_classes)
        return cls(torch.bincount(labels, minlength=num_classes), **kwargs)

    def forward(
        self,
        outputs: torch.Tensor | Mapping[str, Any] | Sequence[Any],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            outputs: (B, K) logits, a mapping or `ModelOutput` with them, or a tuple that starts with them.
            labels: (B,) class indices, or (B, K) probabilities.
            num_items_in_batch: Trainer's number of label elements in all batches of an optimizer step; the sum of the
                losses is divided by the images it stands for, whatever the `reduction`.

        Raises:
            TypeError, ValueError: a wrong type, a wrong shape, a label out of range, NaN in an embedding (values are
                looked at on the CPU only), or an entry that a text term needs is missing.
        """
        logits, entries = _logits(outputs)
        soft = self._check(logits, labels)
        if self.adjustment.device != logits.device and not torch.compiler.is_compiling():
            self.to(logits.device)  # Trainer moves the model, but not its loss
        with torch.autocast(logits.device.type, enabled=False):
            return self._reduced(logits, entries, labels.to(logits.device), soft, num_items_in_batch)

    def _reduced(
        self,
        logits: torch.Tensor,
        entries: dict[str, Any],
        labels: torch.Tensor,
        soft: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.dtype if soft else torch.long)
        counted = torch.ones_like(labels[:, 0], dtype=torch.bool) if soft else labels != self.ignore_index
        adjusted = logits + self.adjustment.to(logits)
        extra = logits.new_zeros(len(logits))
        if self.training and torch.is_grad_enabled():
            entries = self._check_entries(entries, logits)
            if self.compensation and not soft:
                compensation = self._compensation(logits, entries, labels.where(counted, 0), counted)
                adjusted = adjusted + compensation
                # It belongs to the noise in the denominator, not to the classes that smoothing makes targets of.
                extra = extra + self.label_smoothing * compensation.mean(dim=1) if self.label_smoothing else extra
            extra = extra + self._text_terms(entries)
        ignored = -100 if soft else self.ignore_index
        losses = F.cross_entropy(
            adjusted, labels, ignore_index=ignored, reduction="none", label_smoothing=self.label_smoothing
        )
        losses = losses + extra.where(counted, 0)
        if num_items_in_batch is not None:
            return losses.sum() * (logits.shape[1] if soft else 1) / torch.as_tensor(num_items_in_batch).to(losses)
        if self.reduction == "none":
            return losses
        return losses.sum() / (counted.sum() if self.reduction == "mean" else 1)

    def _compensation(
        self, logits: torch.Tensor, entries: dict[str, Any], labels: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        """`gamma_y V_yk / 2` (B, K), through which the gradient reaches the head or the logits: detached it hurts."""
        if {"image_embeds", "class_embeds", "logit_scale"} <= entries.keys():
            self._update(entries["image_embeds"].detach(), labels.where(counted, -1))
            weight = entries["logit_scale"] * entries["class_embeds"]
            projected = weight @ (self.scatter / self.degrees.clamp(min=1e-6)).to(logits)
            variance, covariance = (projected * weight).sum(dim=1), projected[labels] @ weight.T
        else:
            residuals, degrees = _residuals(logits, labels.where(counted, -1))
            residuals = residuals / degrees.clamp(min=1).sqrt()
            variance, covariance = residuals.square().sum(dim=0), residuals[:, labels].T @ residuals
        spread = variance + variance[labels, None] - 2 * covariance
        return self.gamma.to(logits)[labels, None] / 2 * spread

    @torch.no_grad()
    def _update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        residuals, degrees = _residuals(*_from_all_processes(features, labels))
        scatter = residuals.T @ residuals
        if self.scatter.shape != scatter.shape:
            self.scatter = torch.zeros_like(scatter)
        # A batch that overflowed in half precision, of which the gradient scaler skips the step, leaves no trace.
        finite = scatter.isfinite().all()
        self.scatter = torch.where(finite, MEMORY * self.scatter + scatter, self.scatter)
        self.degrees = torch.where(finite, MEMORY * self.degrees + degrees.float(), self.degrees)

    def _text_terms(self, entries: dict[str, Any]) -> torch.Tensor | float:
        total: torch.Tensor | float = 0.0
        if self.text_prior:
            cosine = F.cosine_similarity(entries["class_embeds"], entries["text_embeds"].detach(), dim=-1)
            total = total + self.text_prior * (1 - cosine).mean()
        if self.text_guidance:
            scale = torch.as_tensor(entries["logit_scale"]).detach()  # a learned scale would shrink to please the term
            texts = scale * F.normalize(entries["text_embeds"].detach(), dim=-1)
            views = [F.normalize(entries[name], dim=-1) for name in ("image_embeds", "base_image_embeds")]
            seen, target = (F.log_softmax(view @ texts.T, dim=-1) for view in views)
            divergence = F.kl_div(seen, target.detach(), reduction="none", log_target=True).sum(dim=-1)
            total = total + self.text_guidance * divergence
        return total

    def _check(self, logits: torch.Tensor, labels: torch.Tensor) -> bool:
        """Whether the labels are soft."""
        num_classes = len(self.adjustment)
        if logits.ndim != 2 or logits.shape[1] != num_classes:
            raise ValueError(f"`logits` must have shape (B, {num_classes}), got {tuple(logits.shape)}.")
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"`labels` must be a tensor, got {type(labels).__name__}.")
        if labels.is_floating_point() and labels.shape == logits.shape:
            return True
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"`labels` must be {len(logits)} class indices or probabilities of shape {tuple(logits.shape)}, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        check_labels(labels, num_classes, self.ignore_index)
        return False

    def _check_entries(self, entries: dict[str, Any], logits: torch.Tensor) -> dict[str, Any]:
        needs = {
            "text_prior": ("class_embeds", "text_embeds"),
            "text_guidance": ("image_embeds", "text_embeds", "base_image_embeds", "logit_scale"),
        }
        for term, names in needs.items():
            missing = [name for name in names if name not in entries]
            if getattr(self, term) and missing:
                raise ValueError(
                    f"`{term}` needs {', '.join(f'`{name}`' for name in missing)} beside the logits: give the "
                    "loss the output of a `SageClassifier` in training mode (its batches with `base_image_embeds`)."
                )
        rows = {"image_embeds": len(logits), "base_image_embeds": len(logits)}
        rows |= {"class_embeds": logits.shape[1], "text_embeds": logits.shape[1]}
        for name in rows.keys() & entries.keys():
            embeds = entries[name]
            if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2 or len(embeds) != rows[name]:
                got = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
                raise ValueError(f"`{name}` must be a tensor of shape ({rows[name]}, e), got {got}.")
            if embeds.device.type == "cpu" and not torch.compiler.is_compiling() and not embeds.isfinite().all():
                raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
            entries[name] = embeds.to(logits)
        widths = {name: entries[name].shape[1] for name in sorted(rows.keys() & entries.keys())}
        if len(set(widths.values())) > 1:
            raise ValueError(f"`outputs` must hold embeddings of one width, got {widths}.")
        return entries

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}scatter" in state_dict:
            self.scatter = torch.zeros_like(state_dict[f"{prefix}scatter"], device=self.scatter.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SageLoss:
        # Follow `.to(device)`, but keep float32: rounding the adjustment would bias every logit of a class alike.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def extra_repr(self) -> str:
        names = ("tau", "compensation", "text_prior", "text_guidance", "label_smoothing", "ignore_index", "reduction")
        return ", ".join([f"num_classes={len(self.gamma)}", *(f"{name}={getattr(self, name)!r}" for name in names)])


def _residuals(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (B, d) less the mean of their class in the batch, and their degrees of freedom: images less classes."""
    # (B, B) and not (K, d): the classes of a batch are few, and their number must not be looked at.
    same = ((labels[:, None] == labels) & (labels >= 0)).to(values.dtype)
    images = same.sum(dim=1, keepdim=True)
    residuals = torch.where(images > 0, values - same @ values / images.clamp(min=1), 0)
    return residuals, torch.where(images > 0, 1 - 1 / images.clamp(min=1), 0).sum()


def _from_all_processes(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The batches of all processes as one, so that several train as one; a shorter batch is filled with label -1."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return features, labels
    size = torch.tensor(len(features), device=features.device)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    missing = int(size) - len(features)
    padded = F.pad(features, (0, 0, 0, missing)).contiguous(), F.pad(labels, (0, missing), value=-1).contiguous()
    gathered = [[torch.empty_like(part) for _ in range(dist.get_world_size())] for part in padded]
    for parts, part in zip(gathered, padded, strict=True):
        dist.all_gather(parts, part)
    return torch.cat(gathered[0]), torch.cat(gathered[1])


def _logits(outputs: torch.Tensor | Mapping[str, Any] | Sequence[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The logits of what a model returned, and what else it holds."""
    entries: dict[str, Any] = {}
    if isinstance(outputs, Mapping):
        entries = {name: value for name, value in outputs.items() if value is not None}
        if "logits" not in outputs:
            raise ValueError(f"`outputs` must have `logits`, got only {sorted(outputs)}.")
        outputs = outputs["logits"]
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise TypeError(f"`logits` must be a floating-point tensor, got {kind}.")
    return outputs, entries


def _check_target_prior(target_prior: Sequence[float] | torch.Tensor | None, num_classes: int) -> torch.Tensor:
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
