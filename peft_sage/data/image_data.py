# SPDX-License-Identifier: Apache-2.0
"""A data set as it was read."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset

from .splits import long_tailed_subset
from .table import labels_of, preview


@dataclass
class ImageData:
    """Labelled images, in splits.

    Attributes:
        train, validation, test: Data sets with the columns `image`, `label` (a `ClassLabel`), `file` (what an image is
            called: its file, or its row and table) and, where it is known, `group` (integers: images of one group show
            one object). `validation` may be None.
        class_names: Names of the K classes, in the order of their indices.
        texts: What [`SageClassifier.from_texts`] takes: the descriptions of each class, or the names.
        skipped: What was left out: from the split ("data" if there was none) and the reason to the files.
        notes: What else there is to say about the data.
        grouped_by: Where the groups come from.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    class_names: list[str]
    texts: list[str] | dict[str, list[str]]
    skipped: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    grouped_by: str | None = None

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits that there are, by their names."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def class_counts(self) -> list[int]:
        """(K,) numbers of training images."""
        return self._counts(self.train).tolist()

    def thin(self, imbalance_ratio: float, seed: int = 0) -> "ImageData":
        """Thin the training images to an exponential long tail, as [`long_tailed_subset`] does.

        Args:
            imbalance_ratio: Images of the first class over images of the last.
            seed: Decides which images stay.

        Raises:
            ValueError: `imbalance_ratio` is below 1, or above the images of the largest class.
        """
        labels = labels_of(self.train)
        kept = long_tailed_subset(labels, len(self.class_names), imbalance_ratio, seed)
        return replace(self, train=self.train.select(kept))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of images and all that was left out, for a JSON file."""
        splits = {}
        for name, split in self.splits.items():
            counts = self._counts(split).tolist()
            splits[name] = {
                "images": len(split),
                "classes": sum(count > 0 for count in counts),
                "images_per_class": dict(zip(self.class_names, counts, strict=True)),
            }
        return {
            "splits": splits,
            "skipped": self.skipped,
            "notes": self.notes,
            "grouped_by": self.grouped_by,
        }

    def __str__(self) -> str:
        """A table of splits, images, classes and images per class; below it what was skipped, and why."""
        lines = [f"{'split':<12}{'images':>10}{'classes':>10}   images per class"]
        for name, split in self.splits.items():
            counts = np.sort(self._counts(split))
            counts = counts[counts > 0]
            spread = f"{counts[0]:,} to {counts[-1]:,}, median {np.median(counts):,.0f}"
            lines.append(f"{name:<12}{len(split):>10,}{len(counts):>10,}   {spread}")
        for name, reasons in self.skipped.items():
            for reason, files in reasons.items():
                noun = "file" if len(files) == 1 else "files"
                lines.append(
                    f"skipped {len(files):,} {noun} in {name} {reason} ({preview(files, 3)})"
                )
        return "\n".join(lines + self.notes)

    def _counts(self, split: Dataset) -> np.ndarray:
        return np.bincount(labels_of(split), minlength=len(self.class_names))
