# SPDX-License-Identifier: Apache-2.0
"""Intervals, calibration and gains: the numbers of a report that are more than means."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import binary_calibration_error


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
    total += 2
    up = (gained + 1) / total
    down = (lost + 1) / total
    middle = up - down
    variance = (up + down - middle**2) / total
    half = Z * math.sqrt(variance)
    return max(-1.0, middle - half), min(1.0, middle + half)


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599)."""
    scores = torch.as_tensor(confidences)
    truth = torch.as_tensor(right).int()
    return binary_calibration_error(scores, truth, n_bins=15).item()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the temperature by which to divide logits (n, K) for the lowest cross-entropy on `labels` (n,)."""

    def loss(log_temperature: float) -> float:
        scaled = logits.double() / math.exp(log_temperature)
        return F.cross_entropy(scaled, labels).item()

    # Bounded: where every answer is right, ever sharper scores fit ever better.
    found = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return math.exp(found.x)


def accuracy_by_coverage(
    confidences: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return falling thresholds of the confidence, the share of images at or above each, and the accuracy on these."""
    order = np.argsort(-confidences, kind="stable")
    falling = confidences[order]
    # Images of equal confidence are answered together or not at all.
    is_last = np.append(np.diff(falling) != 0, True)
    ends = np.flatnonzero(is_last)
    answered = ends + 1
    num_right = np.cumsum(right[order])[ends]
    return falling[ends], answered / len(right), num_right / answered


def confidence_threshold(
    confidences: np.ndarray, right: np.ndarray, accuracy: float = 0.95
) -> float | None:
    """Return the lowest confidence at or above which `accuracy` of the answers are right; None if there is none."""
    thresholds, _, accuracies = accuracy_by_coverage(confidences, right)
    enough = thresholds[accuracies >= accuracy]
    return float(enough[-1]) if len(enough) else None


def expected_gains(
    counts: np.ndarray, right: np.ndarray, tested: np.ndarray
) -> tuple[int, np.ndarray]:
    """Estimate what each class would gain from as many further training images as the median class has.

    A logistic regression of the accuracies on the logarithm of the number of training images gives how fast accuracy
    rises. Each class starts from its own accuracy, shrunk towards the regression as if four more test images had been
    seen there, so that a class of which all test images are wrong does not start from an impossible 0.

    Args:
        counts: (K,) numbers of training images, zeros allowed.
        right: (K,) numbers of test images that are classified correctly.
        tested: (K,) numbers of test images.

    Returns:
        The number of further images, and the gains (K,) in points; 0 if accuracy does not rise with the number of
        images, and for classes without test images.
    """
    extra = max(1, int(np.median(counts)))
    images = np.log1p(counts)
    more = np.log1p(counts + extra)
    # Classes without images are answered from their texts, which says nothing about the effect of images.
    has_images = counts > 0
    weights = np.concatenate([right, tested - right])
    weights = weights * np.tile(has_images, 2)
    outcomes = np.repeat([1, 0], len(counts))
    if len(np.unique(outcomes[weights > 0])) < 2:
        return extra, np.zeros(len(counts))
    regression = LogisticRegression()
    inputs = np.tile(images, 2).reshape(-1, 1)
    regression.fit(inputs, outcomes, weights)
    slope = max(0.0, regression.coef_[0, 0])
    fitted = regression.predict_proba(images.reshape(-1, 1))[:, 1]
    level = (right + 4 * fitted) / (tested + 4)
    rise = slope * (more - images)
    gains = expit(logit(level) + rise) - level
    return extra, np.where(tested > 0, 100 * gains, 0).round(3)
