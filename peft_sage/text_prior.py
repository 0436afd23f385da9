# SPDX-License-Identifier: Apache-2.0
"""How far the class texts are to be trusted: the strength of `SageLoss`'s text prior, chosen by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .fitting import SCALE, train_heads
from .loss import SageLoss
from .validation import (
    as_numbers,
    check_class_counts,
    check_embeddings,
    check_integer,
    check_labels,
    check_number,
)


#: With more classes, or more images of a class, a random part of them decides, so that the choice takes seconds.
MAX_CLASSES, MAX_IMAGES = 500, 500


@dataclass(frozen=True)
class TextPrior:
    """What [`choose_text_prior`] found.

    Attributes:
        strength: The chosen strength, for `SageLoss(text_prior=...)`.
        absent: The count to give to classes without training images, for `SageLoss(absent=...)`; None leaves them out
            of the softmax.
        scores: Held-out balanced accuracy of each strength, in [0, 1].
        label_probability: (n,) held-out probability of each image's own label at the chosen strength; NaN for images
            that were not held out. Low ones are likely label errors.
        predicted_label: (n,) the likeliest class of each held-out image; -1 for images that were not held out.
    """

    strength: float
    absent: float | None
    scores: dict[float, float]
    label_probability: Tensor = field(repr=False)
    predicted_label: Tensor = field(repr=False)

    def __str__(self) -> str:
        tried = ", ".join(
            f"{strength:g}: {100 * score:.1f} %"
            for strength, score in self.scores.items()
        )
        return f"text prior {self.strength:g} (held-out balanced accuracy by strength: {tried})"


def choose_text_prior(
    features: Tensor,
    labels: Sequence[int] | Tensor,
    text_embeds: Tensor,
    *,
    class_counts: Sequence[int] | Tensor | None = None,
    strengths: Sequence[float] = (0, 0.1, 0.3, 1, 3, 10),
    folds: int = 3,
    seed: int = 0,
    groups: Sequence[int] | Tensor | None = None,
) -> TextPrior:
    """Choose the strength of the text prior by stratified cross-validation on the training images.

    For each strength and fold a cosine head that starts from the texts is trained on the other folds with the loss of
    [`SageLoss`]. Chosen is the strength with the best balanced accuracy on the held-out images.

    Args:
        features: (n, e) image embeddings of the frozen tower, on any device.
        labels: (n,) class indices.
        text_embeds: (K, e) text embeddings of the classes.
        class_counts: (K,) numbers of training images, if `features` are only some of them.
        strengths: What to try.
        folds: At least 2. Classes with a single image (or group) are never held out.
        seed: Of the folds and the order of the images. The global random state is left alone.
        groups: (n,) integers; images of one animal, patient or product stay in one fold.

    Raises:
        TypeError, ValueError: An argument does not fit, or no class has two images (or groups).
    """
    labels = as_numbers(labels, "labels")
    groups = None if groups is None else as_numbers(groups, "groups")
    strengths, rng = (
        _check(features, labels, text_embeds, strengths, folds, groups),
        Generator().manual_seed(seed),
    )
    counted = (
        torch.bincount(labels, minlength=len(text_embeds))
        if class_counts is None
        else class_counts
    )
    counts = check_class_counts(counted, len(text_embeds))
    present = labels.unique()
    present = present[torch.randperm(len(present), generator=rng)[:MAX_CLASSES]]
    images = (
        torch.isin(labels, present) & (_rank(labels, rng) < MAX_IMAGES)
    ).nonzero()[:, 0]
    classes, own = labels[images].unique(return_inverse=True)
    fold = _folds(own, None if groups is None else groups[images], folds, rng)
    held_out = own[fold >= 0].unique()
    if not len(held_out):
        raise ValueError(
            "`labels` must have a class with two images (or groups) to hold out; give a text prior."
        )
    features, texts = (
        F.normalize(x.float(), dim=-1) for x in (features[images], text_embeds[classes])
    )
    texts, tried = texts.to(features), torch.tensor(strengths).to(features)
    probability, predicted = _cross_validate(
        features, own, texts, counts[classes], fold, tried, rng
    )
    correct = (predicted == own).float()
    scores = torch.stack(
        [correct[:, (fold >= 0) & (own == k)].mean(dim=1) for k in held_out]
    ).mean(dim=0)
    chosen = int(scores.argmax())
    label_probability = torch.full(labels.shape, torch.nan)
    label_probability[images] = probability[chosen]
    predicted_label = torch.full_like(labels, -1, dtype=torch.int64)
    predicted_label[images] = torch.where(fold < 0, -1, classes[predicted[chosen]])
    return TextPrior(
        strengths[chosen],
        1.0,
        dict(zip(strengths, scores.tolist(), strict=True)),
        label_probability,
        predicted_label,
    )


def _cross_validate(
    features: Tensor,
    labels: Tensor,
    texts: Tensor,
    counts: Tensor,
    fold: Tensor,
    tried: Tensor,
    rng: Generator,
) -> tuple[Tensor, Tensor]:
    """Probability of its label, and the likeliest class, of each held-out image: (strengths, n) each."""
    probability = torch.full((len(tried), len(labels)), torch.nan)
    predicted = torch.zeros(len(tried), len(labels), dtype=torch.int64)
    for k in fold[fold >= 0].unique():
        train, held_out = (fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]
        share = torch.bincount(labels[train], minlength=len(texts)) / torch.bincount(
            labels
        )
        loss = SageLoss((counts * share).round()).to(features.device)
        heads = train_heads(
            features[train],
            labels[train],
            texts,
            loss.adjustment.expand(len(tried), -1),
            loss.gamma,
            tried,
            rng,
        )
        logits = (SCALE * features[held_out] @ heads.mT).cpu()
        of_label = logits.softmax(dim=2)[:, range(len(held_out)), labels[held_out]]
        probability[:, held_out] = of_label
        predicted[:, held_out] = logits.argmax(dim=2)
    return probability, predicted


def _check(
    features: Tensor,
    labels: Tensor,
    text_embeds: Tensor,
    strengths: Sequence[float],
    folds: int,
    groups: Tensor | None,
) -> list[float]:
    check_embeddings(features, "features")
    check_embeddings(text_embeds, "text_embeds", features.shape[1])
    check_labels(labels, len(features), len(text_embeds))
    if groups is not None:
        check_labels(groups, len(features), None, name="groups")
    check_integer("folds", folds, 2)
    for strength in strengths or (None,):
        check_number("strengths", strength, 0)
    return sorted(set(strengths))


def _rank(labels: Tensor, rng: Generator) -> Tensor:
    """A random rank of each entry among those of its label."""
    order = torch.randperm(len(labels), generator=rng)
    order = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    return (torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[labels[order]])[
        order.argsort()
    ]


def _folds(labels: Tensor, groups: Tensor | None, folds: int, rng: Generator) -> Tensor:
    """The fold (n,) in which each image is held out; -1 for classes with a single image or group."""
    _, unit = (torch.arange(len(labels)) if groups is None else groups).unique(
        return_inverse=True
    )
    # A group that holds several classes counts for that of its first image.
    first = torch.full((int(unit.max()) + 1,), len(labels)).scatter_reduce(
        0, unit, torch.arange(len(labels)), "amin"
    )
    fold = ((_rank(labels[first], rng) + labels[first]) % folds)[unit]
    pairs = torch.stack([labels, unit]).unique(dim=1)
    return torch.where(torch.bincount(pairs[0])[labels] < 2, -1, fold)
