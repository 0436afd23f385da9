# SPDX-License-Identifier: Apache-2.0
"""What readers are asked for, and what they return: a table of images, still encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, Value

from .labels import Classes, read_labels, renumber, unite
from .splits import match_splits


#: Columns that tell which object, place or person an image shows, if `group_column` names none.
GROUP_COLUMNS = ["group", "group_id", "object", "object_id", "concept", "individual"]
GROUP_COLUMNS += ["individual_id", "patient_id", "sequence_id"]


@dataclass
class Table:
    """Images of one split, or of all, with class indices of their own.

    Attributes:
        labels: (N,) class indices.
        classes: What they mean.
        files: (N,) what an image is called.
        groups: (N,) values of the column that tells which images belong together, if there is one.
        splits: (N,) values of the column `split`, if there is one.
        paths: (N,) the images' files, where they have files of their own.
        images: (N,) data set with the images, not decoded, in its column `image`.
        skipped: What was left out: from the reason to the files.
        rows: Those of the N that count.
    """

    labels: np.ndarray
    classes: Classes
    files: list[str]
    groups: list[Any] | None = None
    splits: list[Any] | None = None
    paths: list[str] | None = None
    images: Dataset = None
    skipped: dict[str, list[str]] = field(default_factory=dict)
    rows: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = np.arange(len(self.labels))
        if self.images is None and self.paths is not None:
            text = Features({"image": Value("string")})
            self.images = encoded(Dataset.from_dict({"image": self.paths}, text))

    def select(self, rows: np.ndarray) -> Table:
        return replace(self, rows=rows)


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
        groups = [self.group_column] if self.group_column else GROUP_COLUMNS
        groups = [name for name in groups if name in columns]
        self.grouped_by = next(iter(groups), self.grouped_by)
        chosen = [self.label_column, *groups[:1]] + ["split"] * ("split" in columns)
        return [*dict.fromkeys(chosen)]

    def table(
        self,
        columns: pa.Table,
        files: list[str],
        locate: Callable[[int], str],
        stated: list[str] | None = None,
        **images: Any,
    ) -> Table:
        """Make a table of the columns that `choose_columns` chose, and the images or their paths."""
        name = self.label_column
        labels, classes = read_labels(columns[name], stated, name, locate)
        groups, splits = (
            columns[column].to_pylist() if column in columns.column_names else None
            for column in (self.grouped_by, "split")
        )
        return Table(labels, classes, files, groups, splits, **images)

    def relative(self, path: str | os.PathLike[str]) -> str:
        return os.path.relpath(path, self.root)

    def note_unread(self, names: list[str]) -> None:
        if names:
            self.notes.append(
                f"Not read, as neither splits nor tables of them: {preview(names)}."
            )


def merge(tables: list[Table], name: str) -> Table:
    """Return the rows of several tables, without images, as one; `name` is that of their column of labels."""
    parts = {table.files[0]: table.classes for table in tables if table.files}
    united = unite(parts, name)
    numbers = [renumber(table.labels, table.classes, united) for table in tables]
    columns: dict[str, Any] = {
        key: [value for table in tables for value in getattr(table, key) or ()]
        for key in ("files", "groups", "splits", "paths")
    }
    columns = {
        k: v if len(v) == len(columns["files"]) else None for k, v in columns.items()
    }
    return Table(np.concatenate(numbers), united, **columns)


def encoded(images: Dataset, column: str = "image") -> Dataset:
    """Return files' bytes or paths as column `image`: decoded they would be large, and not by `read_image`."""
    if column != "image":
        images = images.rename_column(column, "image")
    return images.cast_column("image", Image(decode=False))


def preview(names: Iterable[str], most: int = 10) -> str:
    """Return the first names for a message."""
    names = [*names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
