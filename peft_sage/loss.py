# SPDX-License-Identifier: Apache-2.0
"""The loss of Sage (arXiv 2507.12807): logit adjustment, compensation of the mismatch, and a pull to the texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .validation import as_numbers, check_class_counts, check_labels, check_number


#: How much of what was seen of the covariance before stays after a batch.
MEMORY = 0.95

EMBEDS = ("image_embeds", "base_image_embeds", "class_embeds", "text_embeds")
NEEDS = {
    "text_prior": EMBEDS[2:],
    "text_guidance": (*EMBEDS[:2], "text_embeds", "logit_scale"),
}


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
        class_counts: (K,) numbers of training images; none counts as one.
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
    """

    adjustment: Tensor
    gamma: Tensor
    scatter: Tensor
    degrees: Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        tau: float = 1.0,
        compensation: float = 1.0,
        text_prior: float = 0.0,
        text_guidance: float = 0.0,
        target_prior: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_number("tau", tau)
        check_number("label_smoothing", label_smoothing, 0, 1)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.'
            )
        self.tau, self.compensation, self.text_prior, self.text_guidance = (
            tau,
            compensation,
            text_prior,
            text_guidance,
        )
        self.label_smoothing, self.ignore_index, self.reduction = (
            label_smoothing,
            ignore_index,
            reduction,
        )
        for name in ("compensation", "text_prior", "text_guidance"):
            check_number(name, getattr(self, name), 0)
        counts = check_class_counts(class_counts).double().clamp(min=1)
        target = (
            torch.ones_like(counts)
            if target_prior is None
            else _check_target_prior(target_prior, len(counts))
        )
        adjustment = tau * (counts / counts.sum() / target * target.sum()).log()
        self.register_buffer("adjustment", adjustment.float(), persistent=False)
        self.register_buffer(
            "gamma", (compensation * (0.4 + 8 / counts)).float(), persistent=False
        )
        # The sum of squares within classes, and its degrees of freedom: batches count by how many pairs they hold.
        self.register_buffer("scatter", torch.zeros(0, 0))
        self.register_buffer("degrees", torch.zeros(()))

    @classmethod
    def from_labels(
        cls, labels: Sequence[int] | Tensor, num_classes: int, **kwargs: Any
    ) -> "SageLoss":
        """The loss for the class counts of the training labels (N,), with the further arguments of [`SageLoss`]."""
        labels = as_numbers(labels, "labels")
        check_labels(labels, labels.numel(), num_classes)
        return cls(torch.bincount(labels, minlength=num_classes), **kwargs)

    def forward(
        self,
        outputs: Any,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            outputs: (B, K) logits, a mapping or `ModelOutput` with them, or a tuple that starts with them.
            labels: (B,) class indices, or (B, K) probabilities.
            num_items_in_batch: Trainer's number of label elements in all batches of an optimizer step; the sum of the
                losses is divided by the images it stands for, whatever the `reduction`.

        Raises:
            TypeError, ValueError: a wrong type, shape or value (looked at on the CPU only), or a missing entry.
        """
        logits, entries = _logits(outputs)
        shape, num_classes = tuple(logits.shape), len(self.adjustment)
        if shape[1:] != (num_classes,):
            raise ValueError(
                f"`logits` must have shape (B, {num_classes}), got {shape}."
            )
        soft = isinstance(labels, Tensor) and labels.ndim == 2
        if soft and (labels.shape != shape or not labels.is_floating_point()):
            raise ValueError(
                f"`labels` must be indices (B,) or probabilities {shape}, got {tuple(labels.shape)}."
            )
        if not soft:
            check_labels(labels, len(logits), num_classes, self.ignore_index)
        if (
            self.adjustment.device != logits.device
            and not torch.compiler.is_compiling()
        ):
            self.to(logits.device)  # Trainer moves the model, but not its loss
        labels = labels.to(logits.device)
        counted = (
            torch.ones_like(labels[:, 0], dtype=torch.bool)
            if soft
            else labels != self.ignore_index
        )
        labels = labels.to(logits) if soft else labels.long().where(counted, -1)
        with torch.autocast(logits.device.type, enabled=False):
            losses = self._losses(logits, entries, labels, soft).where(counted, 0)
        if num_items_in_batch is not None:
            return (
                losses.sum()
                * (num_classes if soft else 1)
                / torch.as_tensor(num_items_in_batch).to(losses)
            )
        if self.reduction == "none":
            return losses
        return losses.sum() / (counted.sum() if self.reduction == "mean" else 1)

    def _losses(
        self, logits: Tensor, entries: dict[str, Any], labels: Tensor, soft: bool
    ) -> Tensor:
        """The loss (B,) of each image, where the label -1 does not count."""
        logits, smoothing = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            self.label_smoothing,
        )
        adjusted = compensated = logits + self.adjustment.to(logits)
        extra: Tensor | int = 0
        if self.training and torch.is_grad_enabled():
            self._check_entries(entries, logits)
            extra = self._text_terms(entries)
            if self.compensation and not soft:
                own = labels.clamp(min=0)
                compensated = self._compensate(adjusted, entries, labels, own)
                if smoothing:  # The noise belongs to the denominator, not to the classes that smoothing aims at.
                    noise = compensated - adjusted
                    extra = extra + smoothing * (
                        noise.mean(dim=1) - noise.gather(1, own[:, None])[:, 0]
                    )
        losses = F.cross_entropy(
            compensated,
            labels,
            ignore_index=-1,
            reduction="none",
            label_smoothing=smoothing,
        )
        return losses + extra

    def _compensate(
        self, logits: Tensor, entries: dict[str, Any], labels: Tensor, own: Tensor
    ) -> Tensor:
        """Logits (B, K) and `gamma_y V_yk / 2`, but for the variance of `z_y` in it, which all classes share.

        The gradient reaches the head or the logits through it: detached it hurts.
        """
        if {"image_embeds", "class_embeds", "logit_scale"} <= entries.keys():
            self._update(entries["image_embeds"].detach(), labels)
            rows = entries["logit_scale"] * entries["class_embeds"]
            covariance = (self.scatter / self.degrees.clamp(min=1e-6)).to(logits)
            # Twice the gradient of one factor is that of the square, without a second product of the head's size.
            once = (rows * (rows.detach() @ covariance)).sum(dim=1)
            variance, factor = 2 * once - once.detach(), rows[own] @ covariance
        else:
            residuals, degrees = _residuals(logits, labels)
            rows = (residuals / degrees.clamp(min=1).sqrt()).T
            variance, factor = rows.square().sum(dim=1), rows[own]
        gamma = self.gamma.to(logits)[own]
        return torch.addr(logits, gamma / 2, variance).addmm_(
            gamma[:, None] * factor, rows.T, alpha=-1
        )

    @torch.no_grad()
    def _update(self, features: Tensor, labels: Tensor) -> None:
        residuals, degrees = _residuals(*_from_all_processes(features, labels))
        scatter = residuals.T @ residuals
        if self.scatter.shape != scatter.shape:
            self.scatter = torch.zeros_like(scatter)
        # A batch that overflowed in half precision, of which the gradient scaler skips the step, leaves no trace.
        finite = scatter.isfinite().all()
        self.scatter = torch.where(
            finite, MEMORY * self.scatter + scatter, self.scatter
        )
        self.degrees = torch.where(
            finite, MEMORY * self.degrees + degrees.float(), self.degrees
        )

    def _text_terms(self, entries: dict[str, Any]) -> Tensor | int:
        """The prior, which is one number, and the guidance (B,)."""
        total: Tensor | int = 0
        if self.text_prior:
            rows, texts = entries["class_embeds"], entries["text_embeds"].detach()
            cosine = (rows * texts).sum(dim=1) / (
                rows.norm(dim=1) * texts.norm(dim=1)
            ).clamp(min=1e-8)
            total = self.text_prior * (1 - cosine).mean()
        if self.text_guidance:
            # Detached, as a learned scale would shrink to please the term.
            texts = (
                entries["logit_scale"] * F.normalize(entries["text_embeds"], dim=-1)
            ).detach()
            seen, frozen = (F.normalize(entries[name], dim=-1) for name in EMBEDS[:2])
            # The divergence of two softmaxes, as the Bregman divergence of their log-normaliser.
            view = (frozen @ texts.T).detach()
            slope = view.softmax(dim=-1) @ texts
            divergence = (seen @ texts.T).logsumexp(dim=-1) - view.logsumexp(dim=-1)
            total = total + self.text_guidance * (
                divergence - ((seen - frozen.detach()) * slope).sum(dim=-1)
            )
        return total

    def _check_entries(self, entries: dict[str, Any], logits: Tensor) -> None:
        """Check what a mapping holds beside the logits, and bring it to their type and device."""
        for term, names in NEEDS.items():
            missing = ", ".join(f"`{name}`" for name in names if name not in entries)
            if getattr(self, term) and missing:
                raise ValueError(
                    f"`{term}` needs {missing} in `outputs`, as a training `SageClassifier` gives."
                )
        widths = {}
        rows = dict(
            zip(
                EMBEDS,
                [len(logits), len(logits), logits.shape[1], logits.shape[1]],
                strict=True,
            )
        )
        for name in [name for name in EMBEDS if name in entries]:
            embeds = entries[name]
            if (
                not isinstance(embeds, Tensor)
                or embeds.ndim != 2
                or len(embeds) != rows[name]
            ):
                raise ValueError(
                    f"`{name}` must be ({rows[name]}, e), got {getattr(embeds, 'shape', type(embeds))}."
                )
            if (
                embeds.device.type == "cpu"
                and not torch.compiler.is_compiling()
                and not embeds.isfinite().all()
            ):
                raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
            entries[name], widths[name] = embeds.to(logits), embeds.shape[1]
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"`outputs` must hold embeddings of one width, got {widths}."
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
    ) -> "SageLoss":
        # Follow `.to(device)`, but keep float32: rounding the adjustment would bias every logit of a class alike.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _residuals(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, d) less the mean of their class in the batch, and their degrees of freedom: images less classes."""
    # (B, B) and not (K, d): the classes of a batch are few, and their number must not be looked at.
    same = ((labels[:, None] == labels) & (labels >= 0)).to(values.dtype)
    images = same.sum(dim=1, keepdim=True)
    residuals = torch.where(images > 0, values - same @ values / images.clamp(min=1), 0)
    return residuals, torch.where(images > 0, 1 - 1 / images.clamp(min=1), 0).sum()


def _from_all_processes(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batches of all processes as one, so that several train as one; a shorter batch is filled with label -1."""
    if not (
        dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    ):
        return features, labels
    size = torch.tensor(len(features), device=features.device)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    batch = torch.cat([features, labels[:, None]], dim=1)
    batch = F.pad(batch, (0, 0, 0, int(size) - len(features)), value=-1)
    parts = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, batch)
    return torch.cat(parts)[:, :-1], torch.cat(parts)[:, -1]


def _logits(outputs: Any) -> tuple[Tensor, dict[str, Any]]:
    """The logits of what a model returned, and what else it holds."""
    entries: dict[str, Any] = {}
    if isinstance(outputs, Mapping):
        entries = {name: value for name, value in outputs.items() if value is not None}
        if "logits" not in outputs:
            raise ValueError(
                f"`outputs` must have `logits`, got only {sorted(outputs)}."
            )
        outputs = outputs["logits"]
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError(
            f"`logits` must be a floating-point tensor, got {getattr(outputs, 'dtype', type(outputs))}."
        )
    return outputs, entries


def _check_target_prior(
    target_prior: Sequence[float] | Tensor, num_classes: int
) -> Tensor:
    prior = as_numbers(target_prior, "target_prior").double()
    if (
        prior.shape != (num_classes,)
        or not (prior > 0).all()
        or abs(prior.sum() - 1) > 1e-4
    ):
        raise ValueError(
            f"`target_prior` must be {num_classes} positive numbers with the sum 1, got {prior}."
        )
    return prior
