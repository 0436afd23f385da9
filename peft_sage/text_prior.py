# SPDX-License-Identifier: Apache-2.0
"""How far the class texts are to be trusted: settings of `SageLoss`, chosen by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .fitting import SCALE, check_features, train_heads
from .loss import SageLoss
from .validation import (
    as_numbers,
    check_class_counts,
    check_integer,
    check_labels,
    check_number,
)


#: With more classes, or more images of a class, a random part of them decides, so that the choice takes seconds.
MAX_CLASSES, MAX_IMAGES = 500, 500
#: What a class without images may be given as its count, each with the next stronger prior: the less the loss pushes
#: such classes away, the closer the others must stay to their texts. With None it is left out of the softmax.
ABSENT_COUNTS = (1.0, 0.1, None)
#: The share of the classes that is treated as absent in a fold is one of this number; and the number of such folds.
ABSENT_PARTS, ABSENT_FOLDS = 5, 3


@dataclass(frozen=True)
class TextPrior:
    """What [`choose_text_prior`] found.

    Attributes:
        strength: The chosen strength, for `SageLoss(text_prior=...)`; for the sake of classes without images it may be
            beyond that with the best score.
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
            f"{strength:g}: {100 * score:.1f}%"
            for strength, score in self.scores.items()
        )
        shown = f"text prior {self.strength:g} (held-out balanced accuracy by strength: {tried})"
        if self.absent is None:
            return f"{shown}, classes without images left out of the loss"
        if self.absent != 1:
            shown += f", classes without images counted as {self.absent:g}"
        return shown


class _Sample(NamedTuple):
    """The images that decide, and the classes that they have."""

    images: Tensor  # (n,) indices of the images,
    classes: Tensor  # and (K,) of the classes, among all.
    features: Tensor  # (n, e) unit rows
    labels: Tensor  # (n,) indices among these classes
    texts: Tensor  # (K, e) unit rows
    counts: Tensor  # (K,)
    fold: Tensor  # (n,) -1: never held out


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
    [`SageLoss`]. Chosen is the strength with the best balanced accuracy on the held-out images. If there are classes
    without images, further folds treat a fifth of the others as absent. These are given a count of one at the chosen
    strength, 0.1 at the next, or are left out of the softmax at the one after it: what is best for the accuracy over
    absent and present classes in the proportion in which they will be met. A single strength is kept for all three.

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
    labels = check_features(features, labels, text_embeds)
    check_integer("folds", folds, 2)
    tried: list[Any] = list(strengths) or [None]
    strengths = sorted({check_number("strengths", strength, 0) for strength in tried})
    if class_counts is None:
        class_counts = torch.bincount(labels, minlength=len(text_embeds))
    counts = check_class_counts(class_counts, len(text_embeds))
    rng = Generator().manual_seed(seed)
    sample = _draw(features, labels, text_embeds, counts, groups, folds, rng)
    probability, predicted = _cross_validate(sample, strengths, rng)
    correct = (predicted == sample.labels).float()
    scores = _balanced(correct.where(sample.fold >= 0, torch.nan), sample.labels)
    best = int(scores.argmax())
    missing = int((counts == 0).sum()) / len(counts)
    stronger = strengths[best:] if len(strengths) > 1 else 3 * strengths
    strength, absent = _choose_absent(sample, stronger, missing, rng)
    label_probability = torch.full(labels.shape, torch.nan)
    label_probability[sample.images] = probability[best]
    predicted_label = torch.full(labels.shape, -1)
    predicted_label[sample.images] = sample.classes[predicted[best]]
    return TextPrior(
        strength,
        absent,
        dict(zip(strengths, scores.tolist(), strict=True)),
        label_probability,
        predicted_label.masked_fill(label_probability.isnan(), -1),
    )


def _cross_validate(
    sample: _Sample, strengths: list[float], rng: Generator
) -> tuple[Tensor, Tensor]:
    """Probability of its label, and the likeliest class, of each held-out image: (strengths, n) each."""
    fold = sample.fold
    labels = sample.labels
    probability = torch.full((len(strengths), len(labels)), torch.nan)
    predicted = torch.zeros(probability.shape, dtype=torch.int64)
    for k in fold[fold >= 0].unique():
        pairs = [(strength, 1.0) for strength in strengths]
        heads = _train(sample, fold != k, pairs, rng)
        held_out = (fold == k).nonzero()[:, 0]
        logits = (SCALE * sample.features[held_out] @ heads.mT).cpu()
        of_label = logits.softmax(dim=2)[:, range(len(held_out)), labels[held_out]]
        probability[:, held_out] = of_label
        predicted[:, held_out] = logits.argmax(dim=2)
    return probability, predicted


def _choose_absent(
    sample: _Sample, strengths: list[float], missing: float, rng: Generator
) -> tuple[float, float | None]:
    """The best strength, and count of an absent class, where a share `missing` of all classes has no images."""
    if not missing or len(sample.classes) == 1:
        return strengths[0], 1.0
    stronger = [*strengths, 3 * strengths[-1], 9 * strengths[-1]]
    pairs: list[Any] = list(zip(stronger, ABSENT_COUNTS, strict=False))
    order = torch.randperm(len(sample.texts), generator=rng)
    present, absent = torch.full((2, len(pairs), len(sample.labels)), torch.nan)
    for k in sample.fold[sample.fold >= 0].unique()[:ABSENT_FOLDS]:
        part = order[int(k) % ABSENT_PARTS :: ABSENT_PARTS]
        left_out = torch.isin(sample.labels, part)
        train = (sample.fold != k) & ~left_out
        if not left_out.any() or not train.any():
            continue
        heads = _train(sample, train, pairs, rng)
        held_out = (sample.fold == k) & ~left_out
        for images, results in ((held_out, present), (left_out, absent)):
            logits = sample.features[images] @ heads.mT
            correct = logits.argmax(dim=2).cpu() == sample.labels[images]
            results[:, images] = correct.float()
    seen = _balanced(present, sample.labels).nan_to_num(0)
    unseen = _balanced(absent, sample.labels).nan_to_num(0)
    scores = (1 - missing) * seen + missing * unseen
    return pairs[int(scores.argmax())]


def _train(
    sample: _Sample,
    train: Tensor,
    pairs: Sequence[tuple[float, float | None]],
    rng: Generator,
) -> Tensor:
    """A head for each pair of strength and absent count, trained on some of the images."""
    labels = sample.labels[train]
    classes = len(sample.texts)
    images = torch.bincount(labels, minlength=classes)
    share = images / torch.bincount(sample.labels, minlength=classes)
    counts = (sample.counts * share).round().clamp(min=1) * (images > 0)
    losses = [SageLoss(counts, absent=absent) for _, absent in pairs]
    return train_heads(
        sample.features[train],
        labels,
        sample.texts,
        torch.stack([loss.training_adjustment for loss in losses]),
        losses[0].gamma,
        torch.tensor([strength for strength, _ in pairs]),
        rng,
    )


def _balanced(values: Tensor, labels: Tensor) -> Tensor:
    """The mean (H,) over the classes of the means of values (H, n) over their images, where NaN is left out."""
    means = [values[:, labels == k].nanmean(dim=1) for k in labels.unique()]
    return torch.stack(means).nanmean(dim=0)


def _draw(
    features: Tensor,
    labels: Tensor,
    text_embeds: Tensor,
    counts: Tensor,
    groups: Sequence[int] | Tensor | None,
    folds: int,
    rng: Generator,
) -> _Sample:
    """The images that decide, and their folds."""
    if groups is None:
        groups = torch.arange(len(labels))
    groups = as_numbers(groups, "groups")
    check_labels(groups, len(features), None, name="groups")
    present = labels.unique()
    present = present[torch.randperm(len(present), generator=rng)[:MAX_CLASSES]]
    few_enough = _rank(labels, rng) < MAX_IMAGES
    images = (torch.isin(labels, present) & few_enough).nonzero()[:, 0]
    classes = present.sort().values
    own = torch.searchsorted(classes, labels[images])
    fold = _folds(own, groups[images], folds, rng)
    if not (fold >= 0).any():
        raise ValueError(
            "`labels` must have a class with two images (or groups) to hold out; give `text_prior` and `absent`."
        )
    return _Sample(
        images,
        classes,
        F.normalize(features[images].float(), dim=-1),
        own,
        F.normalize(text_embeds[classes].float(), dim=-1),
        counts[classes].clamp(min=1),
        fold,
    )


def _rank(labels: Tensor, rng: Generator) -> Tensor:
    """A random rank of each entry among those of its label."""
    order = torch.randperm(len(labels), generator=rng)
    order = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    ranks = torch.arange(len(order)) - starts[labels[order]]
    return ranks[order.argsort()]


def _folds(labels: Tensor, groups: Tensor, folds: int, rng: Generator) -> Tensor:
    """The fold (n,) in which each image is held out; -1 for classes with a single group."""
    # A group that holds several classes counts for that of its first image.
    _, first, group = np.unique(groups.numpy(), return_index=True, return_inverse=True)
    label = labels[first]
    fold = ((_rank(label, rng) + label) % folds)[group]
    pairs = torch.stack([labels, torch.from_numpy(group)]).unique(dim=1)
    return torch.where(torch.bincount(pairs[0])[labels] < 2, -1, fold)
