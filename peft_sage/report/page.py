# SPDX-License-Identifier: Apache-2.0
"""What the template of the report shows: one HTML file that asks for nothing else."""

from collections import Counter
from typing import Any

import numpy as np

from ..pictures import read_image
from . import figures
from .results import RunResults
from .statistics import (
    expected_gains,
    paired_difference_interval,
    wilson_interval,
)


class Page:
    """The sections of the report, for the template.

    Args:
        results: The results of the run.
        data: The [`ImageData`] of the run, for the pictures.
    """

    def __init__(self, results: RunResults, data: Any) -> None:
        self.results, self.data = results, data
        self.names = results.class_names
        self.counts = np.array(results.class_counts)
        self.labels = np.array(results.labels)
        self.predictions = np.array(results.trained.predictions)
        self.confidences, self.right = results.answers
        _, self.right_before = results.zero_shot.answers(results.labels)
        self.tested = np.bincount(self.labels, minlength=len(self.names)).tolist()
        wrong = np.flatnonzero(~self.right)
        #: Wrong answers, most confident first.
        self.wrong = wrong[np.argsort(-self.confidences[wrong], kind="stable")]

    def describe(self, k: int) -> dict[str, Any]:
        """Return the figures of a class."""
        right = int(self.right[self.labels == k].sum())
        return {
            "name": self.names[k],
            "count": self.results.class_counts[k],
            "tested": self.tested[k],
            "right": right,
            "before": self.results.zero_shot.per_class[k],
            "accuracy": self.results.trained.per_class[k],
            "interval": wilson_interval(right, max(1, self.tested[k])),
        }

    def classes(self) -> list[dict[str, Any]]:
        """Return all classes, most frequent first."""
        return [self.describe(k) for k in np.argsort(-self.counts, kind="stable")]

    def overall_interval(self) -> tuple[float, float]:
        """Return the 95% interval of the accuracy on all test images."""
        return wilson_interval(int(self.right.sum()), len(self.right))

    def lost(self) -> list[dict[str, Any]]:
        """Return the classes that are worse than before training, the clearest losses first."""
        gained = np.bincount(self.labels, self.right & ~self.right_before)
        lost = np.bincount(self.labels, ~self.right & self.right_before)
        rows = []
        for k in self.results.worse_classes:
            bounds = paired_difference_interval(gained[k], lost[k], self.tested[k])
            difference = (gained[k] - lost[k]) / self.tested[k]
            change = {"bounds": bounds, "difference": difference}
            rows.append(self.describe(k) | change)
        return sorted(rows, key=lambda row: row["bounds"][1])

    def newly_wrong(self) -> list[int]:
        """Return the test images, of classes that are worse than before, that were right before."""
        affected = np.isin(self.labels, self.results.worse_classes)
        return [i for i in self.wrong if self.right_before[i] and affected[i]]

    def mistakes(self, k: int) -> list[int]:
        """Return the test images of a class that are taken for others."""
        return [i for i in self.wrong if self.labels[i] == k]

    def taken_for(self, k: int) -> list[tuple[str, int]]:
        """Return what a class is taken for most often, and how often."""
        guesses = Counter(self.names[self.predictions[i]] for i in self.mistakes(k))
        return guesses.most_common(3)

    def confusions(self) -> list[tuple[tuple[int, int], int]]:
        """Return the most frequent mistakes: a class, what it is taken for, and how often."""
        pairs = zip(self.labels[self.wrong], self.predictions[self.wrong], strict=True)
        return Counter(pairs).most_common(15)

    def gains(self) -> tuple[int, list[dict[str, Any]]]:
        """Return a number of further training images, and the classes that would gain most from them."""
        right = np.bincount(self.labels, self.right, len(self.names))
        extra, gains = expected_gains(self.counts, right, np.array(self.tested))
        best = [k for k in np.argsort(-gains, kind="stable")[:15] if gains[k] > 0]
        return extra, [self.describe(k) | {"gain": gains[k]} for k in best]

    def figure(self, name: str) -> dict[str, str]:
        """Return a figure by the name of the function that draws it."""
        return figures.embed_figure(getattr(figures, f"draw_{name}"), self.results)

    def picture(self, split: str, row: int) -> dict[str, str]:
        """Return a picture of a split and where it is found."""
        item = getattr(self.data, split)[int(row)]
        source = figures.embed_picture(read_image(item["image"]))
        return {"source": source, "file": item["file"]}
