# SPDX-License-Identifier: Apache-2.0
"""The loss of Sage (arXiv 2507.12807): logit adjustment, compensation, and terms that keep close to the texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .covariance import WithinClassCovariance, compensation, within_class_residuals
from .validation import (
    as_numbers,
    by_class,
    check_class_counts,
    check_integer,
    check_labels,
    check_number,
    check_targets,
)


EMBEDS = ("image_embeds", "base_image_embeds", "class_embeds", "text_embeds")
NEEDS = {
    "text_prior": EMBEDS[2:],
    "text_guidance": (*EMBEDS[:2], "text_embeds", "logit_scale"),
}
SETTINGS = (
    "tau",
    "compensation",
    "text_prior",
    "text_guidance",
    "label_smoothing",
    "ignore_index",
    "reduction",
    "absent",
)


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

    Given a mapping with `logits`, `image_embeds` (B, e), `class_embeds` (K, e) and `logit_scale`, where `logits` are
    `logit_scale image_embeds class_embeds'`, Sigma is a moving average over batches and processes; every process must
    then call the loss at every step, even with an empty batch. Given logits alone, V is measured in the batch of the
    process, from classes with two images in it; without any it is zero. In evaluation (`eval()` or without
    gradients), and for soft labels, only the adjustment is applied. The arithmetic is float32, or float64 for float64
    logits.

    Args:
        class_counts: (K,) numbers of training images; a pandas Series or dict is read by its index.
        tau: strength of the adjustment. With `tau` and `compensation` 0 the loss is cross-entropy.
        compensation: factor of gamma.
        text_prior: strength of the term that keeps the head close to the texts, as [`choose_text_prior`] finds it.
            Needs `class_embeds` and `text_embeds` (K, e).
        text_guidance: strength of the term that keeps the adapted tower's view of the texts close to the frozen
            tower's. Needs `image_embeds`, `text_embeds`, `logit_scale` and `base_image_embeds` (B, e).
        target_prior: (K,) class probabilities of the target data, read like `class_counts`; uniform when None.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1].
        ignore_index: label of ignored images. Trainer, which counts the images, knows only -100.
        reduction: `"mean"`, `"sum"` or `"none"`.
        absent: the count that a class without training images is given in the adjustment; with None such classes are
            left out of the softmax while training.
    """

    adjustment: Tensor
    gamma: Tensor
    trained_classes: Tensor | None
    position: Tensor

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
        absent: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.tau = check_number("tau", tau)
        self.compensation = check_number("compensation", compensation, 0)
        self.text_prior = check_number("text_prior", text_prior, 0)
        self.text_guidance = check_number("text_guidance", text_guidance, 0)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
        self.absent = None if absent is None else check_number("absent", absent, 1e-30)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.'
            )
        self.ignore_index = check_integer("ignore_index", ignore_index, -(2**31))
        self.reduction = reduction
        counts = check_class_counts(class_counts)
        target = torch.ones(len(counts), dtype=torch.float64)
        if target_prior is not None:
            target = _check_target_prior(target_prior, len(counts))
        present = counts > 0
        gamma = 0.4 + 8 / counts.double().clamp(min=1)
        # Left out while training, such a class still has a place in the loss of evaluation.
        prior = counts.double().where(present, self.absent or 1.0)
        adjustment = self.tau * (prior / prior.sum() / target * target.sum()).log()
        trained = None
        position = torch.full_like(counts, len(counts))
        if self.absent is None and not present.all():
            trained = present.nonzero()[:, 0]
            position[trained] = torch.arange(len(trained))
        for name, buffer in (
            ("adjustment", adjustment.float()),
            ("gamma", (self.compensation * gamma).float()),
            ("trained_classes", trained),
            ("position", position),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.covariance = WithinClassCovariance()

    @classmethod
    def from_labels(
        cls, labels: Sequence[int] | Tensor, num_classes: int, **kwargs: Any
    ) -> "SageLoss":
        """The loss for the class counts of the training labels (N,), with the further arguments of [`SageLoss`]."""
        labels = as_numbers(labels, "labels")
        check_labels(labels, labels.numel(), num_classes)
        return cls(torch.bincount(labels, minlength=num_classes), **kwargs)

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)
        return f"num_classes={len(self.adjustment)}, {shown}"

    @property
    def training_adjustment(self) -> Tensor:
        """(K,) adjustment while training: minus infinity for classes that are left out of the softmax."""
        if self.trained_classes is None:
            return self.adjustment
        left_out = torch.full_like(self.adjustment, -torch.inf)
        kept = self.trained_classes
        return left_out.index_copy(0, kept, self.adjustment[kept])

    def reset(self) -> None:
        """Forget the covariance that was measured, before another run."""
        self.covariance.reset()

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
            TypeError, ValueError: a wrong type, shape or value (class indices are looked at on the CPU only), or a
                missing entry.
        """
        logits, entries = _read_outputs(outputs)
        soft = isinstance(labels, Tensor) and labels.ndim == 2
        self._check_targets(logits, labels, soft)
        if num_items_in_batch is not None and self.ignore_index != -100:
            raise ValueError(
                "`ignore_index` must be -100 in Trainer, which counts the images by it (`num_items_in_batch`), got"
                f" {self.ignore_index}."
            )
        moved = self.adjustment.device != logits.device
        if moved and not torch.compiler.is_compiling():
            self.to(logits.device)  # Trainer moves the model, but not its loss
        labels = labels.to(logits.device)
        if soft:
            counted = torch.ones_like(labels[:, 0], dtype=torch.bool)
            labels = labels.to(logits)
        else:
            counted = labels != self.ignore_index
            labels = labels.long().where(counted, -1)
        with torch.autocast(logits.device.type, enabled=False):
            losses = self._losses(logits, entries, labels, soft).where(counted, 0)
        if num_items_in_batch is not None:
            elements = losses.sum() * (logits.shape[1] if soft else 1)
            return elements / torch.as_tensor(num_items_in_batch).to(losses).clamp(
                min=1
            )
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / counted.sum().clamp(min=1)

    def _losses(
        self, logits: Tensor, entries: dict[str, Any], labels: Tensor, soft: bool
    ) -> Tensor:
        """The loss (B,) of each image, where the label -1 is ignored."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        adjustment = self.adjustment.to(logits)
        gamma = self.gamma.to(logits)
        if not (self.training and torch.is_grad_enabled()):
            return self._cross_entropy(logits + adjustment, labels)
        self._check_entries(entries, logits)
        extra = self._text_terms(entries)
        if self.compensation and _has_features(entries):
            # Whatever the batch holds: the processes wait for each other here.
            seen = torch.full_like(labels[:, 0], -1) if soft else labels
            self.covariance.update(entries["image_embeds"].detach(), seen)
        if self.trained_classes is not None:
            kept = self.trained_classes
            logits = logits[:, kept]
            adjustment = adjustment[kept]
            gamma = gamma[kept]
            if "class_embeds" in entries:
                entries["class_embeds"] = entries["class_embeds"][kept]
            hard = None if soft else self.position[labels.clamp(min=0)]
            labels = labels[:, kept] if hard is None else hard.where(labels >= 0, -1)
        adjusted = logits + adjustment
        if soft or not self.compensation:
            return self._cross_entropy(adjusted, labels) + extra
        compensated = self._compensate(adjusted, gamma, entries, labels)
        if self.label_smoothing:
            # The noise belongs to the denominator, not to the classes that smoothing aims at.
            noise = compensated - adjusted
            targets = labels.clamp(min=0)[:, None]
            of_targets = noise.gather(1, targets)[:, 0]
            extra = extra + self.label_smoothing * (noise.mean(dim=1) - of_targets)
        return self._cross_entropy(compensated, labels) + extra

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            labels,
            ignore_index=-1,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def _compensate(
        self, logits: Tensor, gamma: Tensor, entries: dict[str, Any], labels: Tensor
    ) -> Tensor:
        """Logits and compensation. Its gradient must reach the head, or the logits: detached it hurts."""
        targets = labels.clamp(min=0)
        if _has_features(entries):
            rows = entries["logit_scale"] * entries["class_embeds"]
            covariance = self.covariance.matrix.to(logits)
        else:
            residuals, degrees = within_class_residuals(logits, labels)
            rows = (residuals / degrees.clamp(min=1).sqrt()).T
            covariance = None
        return logits + compensation(rows, covariance, gamma[targets], targets)

    def _text_terms(self, entries: dict[str, Any]) -> Tensor | int:
        """The prior, which is one number, and the guidance (B,)."""
        total: Tensor | int = 0
        if self.text_prior:
            rows = entries["class_embeds"]
            texts = entries["text_embeds"].detach()
            total = self.text_prior * (1 - F.cosine_similarity(rows, texts)).mean()
        if self.text_guidance:
            # Detached, as a learned scale would shrink to please the term.
            texts = F.normalize(entries["text_embeds"], dim=-1)
            texts = (entries["logit_scale"] * texts).detach()
            adapted, frozen = (
                F.normalize(entries[name], dim=-1) for name in EMBEDS[:2]
            )
            divergence = F.kl_div(
                (adapted @ texts.T).log_softmax(dim=-1),
                (frozen @ texts.T).detach().log_softmax(dim=-1),
                reduction="none",
                log_target=True,
            )
            total = total + self.text_guidance * divergence.sum(dim=-1)
        return total

    def _check_targets(self, logits: Tensor, labels: Tensor, soft: bool) -> None:
        shape = tuple(logits.shape)
        num_classes = len(self.adjustment)
        if shape[1:] != (num_classes,):
            raise ValueError(
                f"`logits` must have shape (B, {num_classes}), got {shape}."
            )
        check_targets(labels, shape, self.ignore_index)
        if self.trained_classes is None or not self.training or soft:
            return
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            counted = labels[labels != self.ignore_index].long()
            absent = self.position.cpu()[counted] == num_classes
            if torch.is_grad_enabled() and absent.any():
                raise ValueError(
                    f"`labels` must be of classes with training images when `absent` is None, got"
                    f" {counted[absent][0].item()}, which has none by `class_counts`."
                )

    def _check_entries(self, entries: dict[str, Any], logits: Tensor) -> None:
        """Check what a mapping holds in addition to the logits, and bring it to their type and device."""
        for term, names in NEEDS.items():
            missing = ", ".join(f"`{name}`" for name in names if name not in entries)
            if getattr(self, term) and missing:
                raise ValueError(
                    f"`{term}` needs {missing} in `outputs`, as a training `SageClassifier` gives."
                )
        widths = {}
        on_cpu = not torch.compiler.is_compiling()
        for name in [name for name in EMBEDS if name in entries]:
            embeds = entries[name]
            rows = logits.shape["image" not in name]
            is_tensor = isinstance(embeds, Tensor)
            if not is_tensor or embeds.ndim != 2 or len(embeds) != rows:
                found = getattr(embeds, "shape", type(embeds))
                raise ValueError(f"`{name}` must be ({rows}, e), got {found}.")
            on_cpu = on_cpu and embeds.device.type == "cpu"
            if on_cpu and not embeds.isfinite().all():
                raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
            entries[name] = embeds.to(logits)
            widths[name] = embeds.shape[1]
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"`outputs` must hold embeddings of one width, got {widths}."
            )

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "SageLoss":
        # Follow `.to(device)`, but keep float32: rounding the adjustment would bias every logit of a class alike.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _has_features(entries: dict[str, Any]) -> bool:
    return {"image_embeds", "class_embeds", "logit_scale"} <= entries.keys()


def _read_outputs(outputs: Any) -> tuple[Tensor, dict[str, Any]]:
    """The logits of what a model returned, and what else it holds."""
    entries: dict[str, Any] = {}
    if isinstance(outputs, Mapping):
        entries = {name: value for name, value in outputs.items() if value is not None}
        if "logits_per_image" in outputs and "logits" not in outputs:
            raise ValueError(
                "`outputs` must have `logits` (B, K) of the classes, got those of a CLIP model: give its"
                " `logits_per_image` if the texts are the K classes, or use a `SageClassifier`."
            )
        if "logits" not in outputs:
            raise ValueError(
                f"`outputs` must have `logits`, got only {sorted(outputs)}."
            )
        outputs = outputs["logits"]
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        found = getattr(outputs, "dtype", type(outputs))
        raise TypeError(f"`logits` must be a floating-point tensor, got {found}.")
    return outputs, entries


def _check_target_prior(
    target_prior: Sequence[float] | Tensor, num_classes: int
) -> Tensor:
    values = by_class(target_prior, "target_prior", num_classes)
    prior = as_numbers(values, "target_prior").double()
    right_shape = prior.shape == (num_classes,)
    if not right_shape or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-4:
        raise ValueError(
            f"`target_prior` must be {num_classes} positive numbers with the sum 1, got {prior}."
        )
    return prior
