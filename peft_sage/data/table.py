# SPDX-License-Identifier: Apache-2.0
"""What readers are asked for, and what they return: a table of images, still encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    Value,
    concatenate_datasets,
)

from .labels import read_labels
from .splits import match_splits


#: Columns that tell which object, place or person an image shows, if `group_column` names none.
GROUP_COLUMNS = ["group", "group_id", "object", "object_id", "concept", "individual"]
GROUP_COLUMNS += ["individual_id", "patient_id", "sequence_id"]


@dataclass
class Table:
    """Images of one split, or of all.

    Attributes:
        labels: (N,) class names.
        files: (N,) what an image is called.
        kinds: From what the labels are, "class names" or "integers", to where.
        classes: Classes that there are, whether or not they have images.
        ordered: Whether these are in the order of their indices.
        groups: (N,) values of the column that tells which images belong together, if there is one.
        splits: (N,) the key of the split that each image is in, if the table has several.
        paths: (N,) the images' files, where they have files of their own.
        images: (N,) data set with the images, not decoded, in its column `image`.
    """

    labels: list[str]
    files: list[str]
    kinds: dict[str, str]
    classes: list[str] = field(default_factory=list)
    ordered: bool = False
    groups: list[Any] | None = None
    splits: list[Any] | None = None
    paths: list[str] | None = None
    images: Dataset = None

    def to_dataset(self, class_names: list[str]) -> Dataset:
        """Return the images, not decoded, with the columns `label`, `file` and, where known, `group` and `path`."""
        label = ClassLabel(names=class_names)
        columns: dict[str, Any] = {"label": label.str2int(self.labels)}
        columns["file"] = self.files
        features = {"label": label, "file": Value("string")}
        if self.groups is not None:
            columns["group"] = self.groups
            features["group"] = Value("int64")
        images = self.images
        if self.paths is not None:
            columns["path"] = self.paths
            features["path"] = Value("string")
            text = Features({"image": Value("string")})
            images = encoded(Dataset.from_dict({"image": self.paths}, text))
        more = Dataset.from_dict(columns, Features(features))
        return concatenate_datasets([images, more], axis=1)


@dataclass
class Request:
    """What to read.

    Attributes:
        source: Folder, file, Hub id or data set, as it was given.
        splits: Names of the splits for the keys train, test and, maybe, validation.
        image_column: Column of tables with the images or the names of their files.
        label_column: Column of tables with the classes.
        group_column: Column of tables that tells which images belong together.
        strict: Whether an image outside the class folders is an error.
        root: Folder that file names are relative to.
        notes: What is to be said about what was not read.
        skipped: What was left out, as in [`ImageData`].
        grouped_by: The column of the groups, once one was found.
    """

    source: Any
    splits: dict[str, str]
    image_column: str
    label_column: str
    group_column: str | None
    strict: bool
    root: Path | None = None
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    grouped_by: str | None = None

    def match(self, found: Iterable[str]) -> dict[str, str]:
        """Return which of the names is which split; ValueError if none is to train on."""
        matched = match_splits(found, self.splits)
        if "train" not in matched:
            raise ValueError(
                f"`source` {self.source!r} has no split {self.splits['train']!r}, only {[*found][:10]}; `train_split` "
                "names another."
            )
        self.note_unread([name for name in found if name not in matched.values()])
        return matched

    def choose_columns(self, found: Iterable[str], where: str) -> list[str]:
        """Return the columns with labels, groups and splits; ValueError if one that was asked for is missing."""
        columns = [*found]
        for argument in ("image_column", "label_column", "group_column"):
            column = getattr(self, argument)
            if column is not None and column not in columns:
                raise ValueError(
                    f"{where} has no column {column!r}, only {columns}; choose one with `{argument}`."
                )
            if columns.count(column) > 1:
                raise ValueError(f"{where} has more than one column {column!r}.")
        wanted = [self.group_column] if self.group_column else GROUP_COLUMNS
        groups = [name for name in wanted if name in columns][:1]
        if groups:
            self.grouped_by = groups[0]
        chosen = [self.label_column, *groups]
        if "split" in columns:
            chosen.append("split")
        return [*dict.fromkeys(chosen)]

    def table(
        self,
        columns: pa.Table,
        files: list[str],
        locate: Callable[[int], str],
        class_names: list[str] | None = None,
        **images: Any,
    ) -> Table:
        """Make a table of the columns that `choose_columns` chose, and the images or their paths."""
        column = self.label_column
        labels, kind = read_labels(columns[column], class_names, column, locate)
        optional = {"groups": self.grouped_by, "splits": "split"}
        for key, name in optional.items():
            if name in columns.column_names:
                images[key] = columns[name].to_pylist()
        return Table(
            labels,
            files,
            kinds={kind: files[0]} if files else {},
            classes=class_names or [],
            ordered=True,
            **images,
        )

    def relative(self, path: str | os.PathLike[str]) -> str:
        return os.path.relpath(path, self.root)

    def skip(self, key: str, reason: str, files: list[str]) -> None:
        """Note files of a split that are left out."""
        if files:
            self.skipped.setdefault(key or "data", {})[reason] = files

    def note_unread(self, names: list[str]) -> None:
        if names:
            self.notes.append(
                f"Not read, as neither splits nor tables of them: {preview(names)}."
            )


def merge(tables: list[Table]) -> Table:
    """Return the rows of several tables, without images, as one."""
    columns: dict[str, Any] = {}
    for key in ("labels", "files", "groups", "splits", "paths"):
        parts = [getattr(table, key) for table in tables]
        columns[key] = None if None in parts else [*chain.from_iterable(parts)]
    kinds: dict[str, str] = {}
    classes: list[str] = []
    for table in tables:
        kinds |= table.kinds
        classes += table.classes
    return Table(**columns, kinds=kinds, classes=classes, ordered=True)


def encoded(images: Dataset, column: str = "image") -> Dataset:
    """Return files' bytes or paths as column `image`: decoded they would be large, and not by `read_image`."""
    if column != "image":
        images = images.rename_column(column, "image")
    return images.cast_column("image", Image(decode=False))


def labels_of(data: Dataset) -> np.ndarray:
    """Return the labels (N,) without a look at the images."""
    labels = data.with_format("numpy", columns=["label"])[:]["label"]
    return np.asarray(labels)


def preview(names: Iterable[str], most: int = 10) -> str:
    """Return the first names for a message."""
    names = [*names]
    shown = names[:most]
    if len(names) > most:
        shown.append("...")
    return ", ".join(shown)
