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


#: What the template shows of a class.
Row = dict[str, Any]


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
        self.tested = self._per_class(self.labels >= 0)
        self.num_right = self._per_class(self.right)
        order = np.argsort(-self.confidences, kind="stable")
        #: Wrong answers, most confident first.
        is_wrong = ~self.right[order]
        self.wrong = order[is_wrong]
        _, right_before = results.zero_shot.answers(results.labels)
        self.gained = self.right & ~right_before
        self.lost = ~self.right & right_before

    def describe(self, k: int) -> Row:
        """Return the figures of a class."""
        right = self.num_right[k]
        tested = self.tested[k]
        before = self.results.zero_shot.per_class
        after = self.results.trained.per_class
        return {
            "name": self.names[k],
            "count": self.results.class_counts[k],
            "tested": tested,
            "right": right,
            "before": before[k],
            "accuracy": after[k],
            "interval": wilson_interval(right, max(1, tested)),
        }

    def classes(self) -> list[Row]:
        """Return all classes, most frequent first."""
        order = np.argsort(-self.counts, kind="stable")
        rows = []
        for k in order:
            rows.append(self.describe(k))
        return rows

    def overall_interval(self) -> tuple[float, float]:
        """Return the 95% interval of the accuracy on all test images."""
        right = int(self.right.sum())
        return wilson_interval(right, len(self.labels))

    def worse(self) -> list[Row]:
        """Return the classes that are worse than before training, the clearest losses first."""
        gained = self._per_class(self.gained)
        lost = self._per_class(self.lost)
        rows = []
        for k in self.results.worse_classes:
            row = self.describe(k)
            up = gained[k]
            down = lost[k]
            tested = self.tested[k]
            row["difference"] = (up - down) / tested
            row["bounds"] = paired_difference_interval(up, down, tested)
            rows.append(row)
        return sorted(rows, key=lambda row: row["bounds"][1])

    def newly_wrong(self) -> list[int]:
        """Return the test images, of classes that are worse than before, that were right before."""
        worse = self.results.worse_classes
        affected = np.isin(self.labels, worse)
        shown = affected & self.lost
        return [i for i in self.wrong if shown[i]]

    def mistakes(self, k: int) -> list[int]:
        """Return the test images of a class that are taken for others."""
        labels = self.labels[self.wrong]
        images = self.wrong[labels == k]
        return images.tolist()

    def taken_for(self, k: int) -> list[tuple[str, int]]:
        """Return what a class is taken for most often, and how often."""
        names: Counter[str] = Counter()
        for i in self.mistakes(k):
            guess = self.predictions[i]
            names[self.names[guess]] += 1
        return names.most_common(3)

    def confusions(self) -> list[tuple[tuple[int, int], int]]:
        """Return the most frequent mistakes: a class, what it is taken for, and how often."""
        pairs: Counter[tuple[int, int]] = Counter()
        for i in self.wrong:
            truth = self.labels[i]
            guess = self.predictions[i]
            pairs[truth, guess] += 1
        return pairs.most_common(15)

    def gains(self) -> tuple[int, list[Row]]:
        """Return a number of further training images, and the classes that would gain most from them."""
        extra, gains = expected_gains(
            self.counts,
            np.array(self.num_right),
            np.array(self.tested),
        )
        best = np.argsort(-gains, kind="stable")
        rows = []
        for k in best[:15]:
            if gains[k] > 0:
                row = self.describe(k)
                row["gain"] = gains[k]
                rows.append(row)
        return extra, rows

    def figure(self, name: str) -> dict[str, str]:
        """Return a figure by the name of the function that draws it."""
        draw = getattr(figures, f"draw_{name}")
        return figures.embed_figure(draw, self.results)

    def picture(self, split: str, row: int) -> dict[str, str]:
        """Return a picture of a split and where it is found."""
        images = getattr(self.data, split)
        item = images[int(row)]
        picture = read_image(item["image"])
        source = figures.embed_picture(picture)
        return {"source": source, "file": item["file"]}

    def _per_class(self, counted: np.ndarray) -> list[int]:
        """Return the number of counted test images of each class."""
        labels = self.labels[counted]
        classes = len(self.names)
        numbers = np.bincount(labels, minlength=classes)
        return numbers.tolist()
