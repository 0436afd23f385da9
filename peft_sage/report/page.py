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
        self.results = results
        self.data = data
        self.names = results.class_names
        self.counts = np.array(results.class_counts)
        self.labels = np.array(results.labels)
        self.predictions = np.array(results.trained.predictions)
        self.confidences, self.right = results.answers
        _, self.right_before = results.zero_shot.answers(results.labels)
        self.tested = self._per_class(np.ones_like(self.labels))
        self.num_right = self._per_class(self.right)
        wrong = np.flatnonzero(~self.right)
        confidences = self.confidences[wrong]
        #: Wrong answers, most confident first.
        self.wrong = wrong[np.argsort(-confidences, kind="stable")]

    def describe(self, k: int) -> dict[str, Any]:
        """Return the figures of a class."""
        right = self.num_right[k]
        tested = self.tested[k]
        return {
            "name": self.names[k],
            "count": self.results.class_counts[k],
            "tested": tested,
            "right": right,
            "before": self.results.zero_shot.per_class[k],
            "accuracy": self.results.trained.per_class[k],
            "interval": wilson_interval(right, max(1, tested)),
        }

    def classes(self) -> list[dict[str, Any]]:
        """Return all classes, most frequent first."""
        order = np.argsort(-self.counts, kind="stable")
        return [self.describe(k) for k in order]

    def overall_interval(self) -> tuple[float, float]:
        """Return the 95% interval of the accuracy on all test images."""
        return wilson_interval(sum(self.num_right), len(self.labels))

    def lost(self) -> list[dict[str, Any]]:
        """Return the classes that are worse than before training, the clearest losses first."""
        gained = self._per_class(self.right & ~self.right_before)
        lost = self._per_class(~self.right & self.right_before)
        rows = []
        for k in self.results.worse_classes:
            row = self.describe(k)
            tested = row["tested"]
            row["difference"] = (gained[k] - lost[k]) / tested
            row["bounds"] = paired_difference_interval(gained[k], lost[k], tested)
            rows.append(row)
        return sorted(rows, key=lambda row: row["bounds"][1])

    def newly_wrong(self) -> list[int]:
        """Return the test images, of classes that are worse than before, that were right before."""
        affected = np.isin(self.labels, self.results.worse_classes)
        shown = affected & self.right_before
        return [i for i in self.wrong if shown[i]]

    def mistakes(self, k: int) -> list[int]:
        """Return the test images of a class that are taken for others."""
        return [i for i in self.wrong if self.labels[i] == k]

    def taken_for(self, k: int) -> list[tuple[str, int]]:
        """Return what a class is taken for most often, and how often."""
        guesses = self.predictions[self.mistakes(k)].tolist()
        most_common = Counter(guesses).most_common(3)
        return [(self.names[guess], count) for guess, count in most_common]

    def confusions(self) -> list[tuple[tuple[int, int], int]]:
        """Return the most frequent mistakes: a class, what it is taken for, and how often."""
        truths = self.labels[self.wrong].tolist()
        guesses = self.predictions[self.wrong].tolist()
        return Counter(zip(truths, guesses, strict=True)).most_common(15)

    def gains(self) -> tuple[int, list[dict[str, Any]]]:
        """Return a number of further training images, and the classes that would gain most from them."""
        right = np.array(self.num_right)
        tested = np.array(self.tested)
        extra, gains = expected_gains(self.counts, right, tested)
        rows = []
        for k in np.argsort(-gains, kind="stable")[:15]:
            if gains[k] > 0:
                rows.append(self.describe(k) | {"gain": gains[k]})
        return extra, rows

    def figure(self, name: str) -> dict[str, str]:
        """Return a figure by the name of the function that draws it."""
        draw = getattr(figures, f"draw_{name}")
        return figures.embed_figure(draw, self.results)

    def picture(self, split: str, row: int) -> dict[str, str]:
        """Return a picture of a split and where it is found."""
        item = getattr(self.data, split)[int(row)]
        source = figures.embed_picture(read_image(item["image"]))
        return {"source": source, "file": item["file"]}

    def _per_class(self, counted: np.ndarray) -> list[int]:
        """Return the number of counted test images of each class."""
        numbers = np.bincount(self.labels, counted, minlength=len(self.names))
        return [int(number) for number in numbers]
