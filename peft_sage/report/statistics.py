# SPDX-License-Identifier: Apache-2.0
"""Intervals, calibration and gains: the numbers of a report that are more than means."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression


#: The quantile of the normal distribution that makes 95% intervals.
Z = 1.959964


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of `right` of `total` images, as fractions (Wilson 1927)."""
    interval = binomtest(right, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference_interval(
    gained: int, lost: int, total: int
) -> tuple[float, float]:
    """Return the 95% interval of the difference of two accuracies on the same images, as fractions.

    The adjusted Wald interval of Bonett and Price (2012, doi 10.3102/1076998611411915).

    Args:
        gained: Images that only the second model gets right.
        lost: Images that only the first model gets right.
        total: All images.
    """
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    middle = up - down
    half = Z * ((up + down - middle**2) / (total + 2)) ** 0.5
    return max(-1.0, middle - half), min(1.0, middle + half)


def reliability_curve(
    confidences: np.ndarray, right: np.ndarray, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean confidence, the accuracy and the number of images of each bin that has any.

    Args:
        confidences: (n,) probabilities of the predicted classes.
        right: (n,) whether the predictions are right.
        bins: Number of bins of equal width.
    """
    place = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    sizes = np.bincount(place, minlength=bins)
    filled = sizes > 0
    sums = [
        np.bincount(place, values, bins)[filled] / sizes[filled]
        for values in (confidences, right)
    ]
    return sums[0], sums[1], sizes[filled]


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599)."""
    confidence, accuracy, sizes = reliability_curve(confidences, right)
    return float(np.average(np.abs(confidence - accuracy), weights=sizes))


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the temperature by which to divide logits (n, K) for the lowest cross-entropy on `labels` (n,)."""

    def loss(log_temperature: float) -> float:
        scaled = logits.double() / math.exp(log_temperature)
        return F.cross_entropy(scaled, labels).item()

    # Bounded: where every answer is right, ever sharper scores fit ever better.
    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def accuracy_by_coverage(
    confidences: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return falling thresholds of the confidence, the share of images at or above each, and the accuracy on these."""
    order = np.argsort(-confidences, kind="stable")
    confidences, right = confidences[order], right[order]
    # Images of equal confidence are answered together or not at all.
    ends = np.flatnonzero(np.append(np.diff(confidences) != 0, True))
    answered = ends + 1
    accuracy = np.cumsum(right)[ends] / answered
    return confidences[ends], answered / len(right), accuracy


def confidence_threshold(
    confidences: np.ndarray, right: np.ndarray, accuracy: float = 0.95
) -> float | None:
    """Return the lowest confidence at or above which `accuracy` of the answers are right; None if there is none."""
    thresholds, _, accuracies = accuracy_by_coverage(confidences, right)
    enough = np.flatnonzero(accuracies >= accuracy)
    return float(thresholds[enough[-1]]) if len(enough) else None


def expected_gains(
    counts: np.ndarray, right: np.ndarray, tested: np.ndarray
) -> tuple[int, list[tuple[int, float]]]:
    """Estimate what each class would gain from as many further training images as the median class has.

    A logistic regression of the accuracies on the logarithm of the number of training images gives how fast accuracy
    rises. Each class starts from its own accuracy, shrunk towards the regression as if four more test images had been
    seen there, so that a class of which all test images are wrong does not start from an impossible 0.

    Args:
        counts: (K,) numbers of training images, zeros allowed.
        right: (K,) numbers of test images that are classified correctly.
        tested: (K,) numbers of test images.

    Returns:
        The number of further images, and the tested classes with their gains in points, largest first; empty if
        accuracy does not rise with the number of images.
    """
    extra = max(1, int(np.median(counts)))
    classes = np.flatnonzero(tested > 0)
    # Classes without images are answered from their texts, which says nothing about the effect of images.
    known = classes[counts[classes] > 0]
    weights = np.concatenate([right[known], (tested - right)[known]])
    outcomes = np.repeat([1, 0], len(known))
    if len(np.unique(counts[known])) < 2 or len(np.unique(outcomes[weights > 0])) < 2:
        return extra, []
    images = np.log1p(counts)[:, None]
    regression = LogisticRegression()
    regression.fit(np.tile(images[known], (2, 1)), outcomes, weights)
    slope = regression.coef_[0, 0]
    if slope <= 0:
        return extra, []
    fitted = regression.predict_proba(images[classes])[:, 1]
    level = (right[classes] + 4 * fitted) / (tested[classes] + 4)
    rise = slope * (np.log1p(counts[classes] + extra) - images[classes, 0])
    gains = 100 * (1 / (1 + (1 / level - 1) * np.exp(-rise)) - level)
    order = np.argsort(-gains, kind="stable")
    return extra, [(int(classes[i]), float(gains[i])) for i in order]


def confused_pairs(
    labels: Sequence[int], predictions: Sequence[int], num_classes: int
) -> list[tuple[int, int, int, int]]:
    """Return pairs of classes that are confused, most often first: `(a, b, a taken for b, b taken for a)`."""
    confusion = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(confusion, (labels, predictions), 1)
    np.fill_diagonal(confusion, 0)
    both = np.triu(confusion + confusion.T)
    rows, columns = np.nonzero(both)
    order = np.argsort(-both[rows, columns], kind="stable")
    pairs = []
    for a, b in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if confusion[a, b] < confusion[b, a]:
            a, b = b, a
        pairs.append((a, b, int(confusion[a, b]), int(confusion[b, a])))
    return pairs
