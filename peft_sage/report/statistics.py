# SPDX-License-Identifier: Apache-2.0
"""Intervals, calibration and gains: the numbers of a report that are more than means."""

import math

import numpy as np
import torch
from numpy import ndarray
from scipy.special import expit, logit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import binary_calibration_error


#: The quantile of the normal distribution that makes 95% intervals.
Z = 1.959964


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of `right` of `total` images, as fractions (Wilson 1927)."""
    result = binomtest(right, total)
    low, high = result.proportion_ci(method="wilson")
    return float(low), float(high)


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
    low = max(-1.0, middle - half)
    high = min(1.0, middle + half)
    return low, high


def calibration_error(confidences: ndarray, right: ndarray) -> float:
    """Return the expected calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599)."""
    scores = torch.as_tensor(confidences)
    truth = torch.as_tensor(right).int()
    return binary_calibration_error(scores, truth, n_bins=15).item()


def accuracy_by_coverage(
    confidences: ndarray, right: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    """Return falling thresholds of the confidence, the share of images at or above each, and the accuracy on these."""
    order = np.argsort(-confidences, kind="stable")
    falling = confidences[order]
    # Images of equal confidence are answered together or not at all.
    is_last = np.append(np.diff(falling) != 0, True)
    ends = np.flatnonzero(is_last)
    answered = ends + 1
    num_right = np.cumsum(right[order])
    share = answered / len(right)
    accuracy = num_right[ends] / answered
    return falling[ends], share, accuracy


def confidence_threshold(
    confidences: ndarray, right: ndarray, accuracy: float = 0.95
) -> float | None:
    """Return the lowest confidence at or above which `accuracy` of the answers are right; None if there is none."""
    thresholds, _, accuracies = accuracy_by_coverage(confidences, right)
    enough = thresholds[accuracies >= accuracy]
    if not len(enough):
        return None
    return float(enough[-1])


def expected_gains(
    counts: ndarray, right: ndarray, tested: ndarray
) -> tuple[int, ndarray]:
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
    median = int(np.median(counts))
    extra = max(1, median)
    images = np.log1p(counts)
    rise = np.log1p(counts + extra) - images
    # Classes without images are answered from their texts, which says nothing about the effect of images.
    known = counts > 0
    wrong = tested - right
    weights = np.concatenate([right[known], wrong[known]])
    inputs = np.tile(images[known], 2)
    outcomes = np.repeat([1, 0], known.sum())
    found = outcomes[weights > 0]
    if len(np.unique(found)) < 2:
        return extra, np.zeros(len(counts))
    regression = LogisticRegression()
    inputs = inputs.reshape(-1, 1)
    regression.fit(inputs, outcomes, weights)
    slope = max(0.0, regression.coef_[0, 0])
    inputs = images.reshape(-1, 1)
    probabilities = regression.predict_proba(inputs)
    fitted = probabilities[:, 1]
    level = (right + 4 * fitted) / (tested + 4)
    higher = logit(level) + slope * rise
    gains = expit(higher) - level
    gains[tested == 0] = 0
    return extra, (100 * gains).round(3)
