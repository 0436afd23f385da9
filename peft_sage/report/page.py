# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that asks for nothing else."""

from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..pictures import read_image
from . import figures
from .results import RunResults
from .statistics import (
    confused_pairs,
    expected_gains,
    paired_difference_interval,
    wilson_interval,
)


#: How much of each kind the page shows: pictures come in rows of three on a phone and of six elsewhere.
EXAMPLES, PICTURES, ROWS = 3, 12, 15
TEMPLATE = Path(__file__).with_name("page.html.jinja")


class Page:
    """What the template shows, section by section.

    Args:
        results: The results of the run.
        data: The [`ImageData`] of the run, for the pictures.
    """

    def __init__(self, results: RunResults, data: Any) -> None:
        self.results, self.data = results, data
        self.labels = np.array(results.labels)
        self.predictions = np.array(results.trained.predictions)
        self.confidences, self.right = results.trained.answers(results.labels)
        _, self.right_before = results.zero_shot.answers(results.labels)
        num_classes = len(results.class_names)
        self.tested = np.bincount(self.labels, minlength=num_classes)
        wrong = np.flatnonzero(~self.right)
        #: Wrong answers, most confident first.
        self.wrong = wrong[np.argsort(-self.confidences[wrong], kind="stable")]

    def render(self) -> str:
        """Return the page."""
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(page=self, run=self.results)

    def class_row(self, k: int) -> dict[str, Any]:
        """Return what is known about a class."""
        right = int(self.right[self.labels == k].sum())
        tested = int(self.tested[k])
        interval = None
        if tested:
            interval = [100 * x for x in wilson_interval(right, tested)]
        return {
            "name": self.results.class_names[k],
            "count": self.results.class_counts[k],
            "tested": tested,
            "before": self.results.zero_shot.per_class[k],
            "accuracy": self.results.trained.per_class[k],
            "right_before": int(self.right_before[self.labels == k].sum()),
            "right": right,
            "interval": interval,
        }

    def overall_interval(self) -> list[float]:
        """Return the interval of the accuracy on all test images, in percent."""
        return [
            100 * x for x in wilson_interval(int(self.right.sum()), len(self.right))
        ]

    def classes(self) -> list[dict[str, Any]]:
        """Return all classes, most frequent first."""
        counts = np.array(self.results.class_counts)
        return [self.class_row(int(k)) for k in np.argsort(-counts, kind="stable")]

    def lost(self) -> list[dict[str, Any]]:
        """Return the classes that are worse than before training, the clearest losses first."""
        rows = []
        for k in self.results.worse_classes:
            own = self.labels == k
            gained = int((self.right & ~self.right_before & own).sum())
            lost = int((self.right_before & ~self.right & own).sum())
            bounds = paired_difference_interval(gained, lost, int(own.sum()))
            difference = 100 * (gained - lost) / own.sum()
            row = self.class_row(k)
            row["difference"] = difference
            row["bounds"] = [100 * x for x in bounds]
            rows.append(row)
        return sorted(rows, key=lambda row: (row["bounds"][1], row["difference"]))

    def newly_wrong(self) -> list[dict[str, str]]:
        """Return test images that were right before training, of the classes that are worse now."""
        affected = np.isin(self.labels, self.results.worse_classes)
        rows = [row for row in self.wrong if self.right_before[row] and affected[row]]
        return [self.mistake(row) for row in rows[:PICTURES]]

    def worst(self) -> list[dict[str, Any]]:
        """Return the worst classes with what they are taken for."""
        rows = []
        for k in self.results.worst_classes:
            mistakes = self.wrong[self.labels[self.wrong] == k]
            guesses = Counter(self.predictions[mistakes].tolist()).most_common(3)
            row = self.class_row(k)
            row["taken_for"] = ", ".join(
                f"{self.results.class_names[guess]} ({count})"
                for guess, count in guesses
            )
            row["pictures"] = [self.mistake(i) for i in mistakes[:EXAMPLES]]
            rows.append(row)
        return rows

    def pairs(self) -> list[dict[str, Any]]:
        """Return the pairs of classes that are confused most often."""
        names = self.results.class_names
        rows = []
        pairs = confused_pairs(self.labels, self.predictions, len(names))
        for a, b, there, back in pairs[:ROWS]:
            text = f"{there} of {self.tested[a]} {names[a]} taken for {names[b]}"
            if back:
                text += f"; {back} of {self.tested[b]} {names[b]} taken for {names[a]}"
            rows.append({"text": text, "count": there + back})
        return rows

    def confident(self) -> list[dict[str, str]]:
        """Return the wrong answers with the highest confidence."""
        return [self.mistake(row) for row in self.wrong[:PICTURES]]

    def suspects(self) -> list[dict[str, str]]:
        """Return the training images whose labels are likely wrong."""
        names = self.results.class_names
        pictures = []
        for suspect in (self.results.suspects or [])[:PICTURES]:
            label, predicted = names[suspect["label"]], names[suspect["predicted"]]
            caption = f"labelled {label} ({100 * suspect['probability']:.2g}%), looks like {predicted}"
            pictures.append(_picture(self.data.train, suspect["index"], caption))
        return pictures

    def gains(self) -> tuple[int, list[dict[str, Any]]]:
        """Return a number of further training images, and the classes that would gain most from them."""
        counts = np.array(self.results.class_counts)
        right = np.bincount(self.labels[self.right], minlength=len(counts))
        extra, gains = expected_gains(counts, right, self.tested)
        return extra, [self.class_row(k) | {"gain": gain} for k, gain in gains[:ROWS]]

    def figure(self, name: str) -> dict[str, str]:
        """Return a figure by the name of the function that draws it."""
        return figures.embed_figure(getattr(figures, f"draw_{name}"), self.results)

    def mistake(self, row: int) -> dict[str, str]:
        """Return a test image with what it was taken for."""
        names = self.results.class_names
        truth, guess = names[self.labels[row]], names[self.predictions[row]]
        caption = f"{truth}, taken for {guess} ({100 * self.confidences[row]:.0f}%)"
        return _picture(self.data.test, int(row), caption)


def make_page(results: RunResults, data: Any) -> str:
    """Return the report as one HTML file, with pictures from the [`ImageData`] of the run."""
    return Page(results, data).render()


def _picture(dataset: Any, row: int, caption: str) -> dict[str, str]:
    item = dataset[row]
    source = figures.embed_picture(read_image(item["image"]))
    return {"source": source, "caption": caption, "file": item["file"]}
