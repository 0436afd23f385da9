# SPDX-License-Identifier: Apache-2.0
"""What readers are asked for, and what they return: a table of images, still encoded."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    Value,
    concatenate_datasets,
)

from .splits import match_splits


#: Columns that tell which object, place or person an image shows, if `group_column` names none.
GROUP_COLUMNS = [
    "group",
    "group_id",
    "object",
    "object_id",
    "concept",
    "individual",
    "individual_id",
    "patient_id",
    "sequence_id",
]
#: What the column with the names of image files may be called, where none has the name that was asked for.
FILE_COLUMNS = ["file_name", "filename", "file", "path", "image_path"]


@dataclass
class Table:
    """Images of one split, or of all.

    Attributes:
        labels: (N,) class names.
        kind: What the labels are, "class names" or "integers".
        files: (N,) what an image is called.
        paths: (N,) the images' files; None for those that have none of their own.
        images: (N,) data set with the images, not decoded, in its column `image`.
        splits: (N,) the key of the split of each; "" if splits are to be drawn, None for one that is not asked for.
        groups: (N,) values that tell which images belong together, None where nothing does.
        classes: Classes that there are, whether or not they have images.
        ordered: Whether these are in the order of their indices.
    """

    labels: list[str]
    kind: str
    files: list[str]
    paths: list[str | None]
    images: Dataset
    splits: list[str | None]
    groups: list[Any]
    classes: list[str]
    ordered: bool


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

    def find_image_column(self, columns: list[str], where: str) -> str:
        """Return the column with the images; ValueError if it or another that was asked for is missing."""
        files = [name for name in FILE_COLUMNS if name in columns]
        image = self.image_column
        if image not in columns and self.image_column == "image" and files:
            image = files[0]
        for argument, column in (
            ("image_column", image),
            ("label_column", self.label_column),
            ("group_column", self.group_column),
        ):
            if column is not None and column not in columns:
                raise ValueError(
                    f"{where} has no column {column!r}, only {columns}; choose one with `{argument}`."
                )
        return image

    def find_groups(self, data: Dataset) -> list[Any]:
        """Return what a column says about which images belong together; None for each without such a column."""
        wanted = [self.group_column] if self.group_column else GROUP_COLUMNS
        columns = [name for name in wanted if name in data.column_names]
        if not columns:
            return [None] * len(data)
        self.grouped_by = columns[0]
        return data.with_format(None)[columns[0]][:]

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


def images_of_files(paths: list[Any]) -> Dataset:
    """A data set of images, not decoded, in files of their own."""
    return encoded(Dataset.from_dict({"image": paths}, Features(image=Value("string"))))


def encoded(images: Dataset, column: str = "image") -> Dataset:
    """Return files' bytes or paths as column `image`: decoded they would be large, and not by `read_image`."""
    images = images.select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    return images.cast_column("image", Image(decode=False))


def join(
    tables: list[Table], class_names: list[str], groups: list[int] | None
) -> Dataset:
    """Return the rows of all tables, with columns `image`, `label`, `file`, `path`, `split` and, maybe, `group`."""
    features = {"label": ClassLabel(names=class_names)}
    features |= dict.fromkeys(["file", "path", "split"], Value("string"))
    columns: dict[str, list[Any]] = {
        "label": features["label"].str2int(chained(tables, "labels")),
        "file": chained(tables, "files"),
        "path": chained(tables, "paths"),
        "split": chained(tables, "splits"),
    }
    if groups is not None:
        features["group"] = Value("int64")
        columns["group"] = groups
    images = concatenate_datasets([table.images for table in tables])
    more = Dataset.from_dict(columns, Features(features))
    return concatenate_datasets([images, more], axis=1)


def chained(tables: list[Table], name: str) -> list[Any]:
    """Return an attribute of the rows of all tables."""
    return [*chain.from_iterable(getattr(table, name) for table in tables)]


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
