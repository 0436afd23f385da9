# SPDX-License-Identifier: Apache-2.0
"""Labelled images as they are found in folders, tables and on the Hub. A split is one only where it is meant as such:
the first folder of `train/CLASS/*.jpg`, a table's name, a column `split`; never a word somewhere in a path."""

from __future__ import annotations

import glob
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from labels import Classes, is_text, read_labels, stated_names, unite

from peft_sage.descriptions import read_csv, read_text
from peft_sage.pictures import is_image_name, read_image


#: What a split may be called as well, where none has the name that was asked for.
OTHER_NAMES = {
    "train": ["training"],
    "validation": ["valid", "val", "dev"],
    "test": ["testing"],
}
#: What the column with the names of image files may be called, where none has the name that was asked for.
FILE_COLUMNS = ["file_name", "filename", "file", "path", "image_path"]
#: Tables of files in an image folder, as `datasets` has them.
METADATA = ["metadata.csv", "metadata.jsonl"]


@dataclass
class Place:
    """Says where a row is found: in which file, and in which of its lines or rows (counted from 0)."""

    files: list[str]
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    lines: list[int] | None = None

    def __call__(self, row: int) -> str:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        number = (
            f"row {row - self.starts[file]}"
            if self.lines is None
            else f"line {self.lines[row]}"
        )
        return f"{number} of {self.files[file]!r}"


@dataclass
class LabelledImages:
    """One split: the images, still encoded, and a class index for each.

    Attributes:
        images: Data set with the files' bytes or paths in its column `image_column`.
        image_column: Name of that column.
        labels: (N,) class indices.
        split: Name of the split, for errors.
        place: Says where a row of the table is found, if there is one.
        rows: (N,) rows of that table.
    """

    images: Dataset
    image_column: str
    labels: np.ndarray
    split: str = ""
    place: Place | None = None
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.images.features[self.image_column] != Image(decode=False):
            self.images = self.images.cast_column(
                self.image_column, Image(decode=False)
            )
        if self.rows is None:
            self.rows = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> LabelledImages:
        return replace(
            self,
            images=self.images.select(indices),
            labels=self.labels[indices],
            rows=self.rows[indices],
        )

    def read(self, index: int, min_side: int | None = None) -> PIL.Image.Image:
        """Decode an image with [`read_image`]; its errors name file, row and split."""
        source = self.source(index)
        return read_image(source, self.name(index, source), min_side)

    def source(self, index: int) -> dict[str, Any]:
        """Return the file of an image, by its bytes or its path."""
        return self.images[int(index)][self.image_column] or {
            "bytes": None,
            "path": None,
        }

    def name(self, index: int, source: dict[str, Any] | None = None) -> str:
        """Return what errors call an image."""
        source = source or self.source(index)
        path = source["path"] if source["bytes"] is None else None
        row = (
            self.place(self.rows[index])
            if self.place
            else None
            if path
            else f"row {self.rows[index]}"
        )
        return ", ".join(
            filter(
                None,
                [
                    repr(path) if path else None,
                    row,
                    self.split and f"split {self.split!r}",
                ],
            )
        )


@dataclass
class Table:
    """A split as it was found, with class indices of its own.

    Attributes:
        images: The images.
        classes: What their class indices mean.
        paths: Their files, where they have files of their own.
        skipped: What was left out: from the reason to the files.
    """

    images: LabelledImages
    classes: Classes
    paths: np.ndarray | None = None
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def select(self, indices: np.ndarray) -> Table:
        paths = None if self.paths is None else self.paths[indices]
        return replace(self, images=self.images.select(indices), paths=paths)


def match_splits(found: Iterable[str], wanted: dict[str, str]) -> dict[str, str]:
    """Return which of the names is which split; other spellings count where the wanted one is missing."""
    left, matched = list(found), {}
    for key, name in sorted(wanted.items(), key=lambda item: item[1] not in left):
        for candidate in [name, *OTHER_NAMES.get(name, [])]:
            hits = [other for other in left if other == candidate] or [
                o for o in left if o.lower() == candidate
            ]
            if hits and key not in matched:
                matched[key] = hits[0]
                left.remove(hits[0])
    return matched


@dataclass
class Reader:
    """Reads a folder, a table or a data set of the Hub.

    Attributes:
        name: The folder, file or id.
        wanted: Names of the splits for the keys train, test and, maybe, validation.
        image_column: Column of tables with the images or the names of their files.
        label_column: Column of tables with the classes.
        strict: Whether an image beside the class folders is an error and not skipped.
        notes: What is to be said about what was not read.
    """

    name: str
    wanted: dict[str, str]
    image_column: str
    label_column: str
    strict: bool
    notes: list[str] = field(default_factory=list)

    def read(self) -> dict[str, Table]:
        """Return the splits under the keys of `wanted`, as far as there are any, or all images under ""."""
        path = Path(
            self.name if os.path.lexists(self.name) else os.path.expanduser(self.name)
        ).absolute()
        try:
            if self.name and path.is_dir():
                return self._folder(path)
            if path.is_file():
                return self._table_of_all(path)
        except OSError as error:
            raise ValueError(
                f"`--dataset` {self.name!r} cannot be read: {error}"
            ) from error
        if not self.name or self.name.startswith((".", "/", "~")):
            raise ValueError(f"`--dataset` {self.name!r} is not a folder.")
        return self._hub()

    def _hub(self) -> dict[str, Table]:
        try:
            data = load_dataset(self.name)
        except Exception as error:
            raise ValueError(
                f"`--dataset` {self.name!r} is neither a folder nor a data set that the Hub gives: {error}"
            ) from error
        tables = {}
        for key, split in self._match(data).items():
            rows = data[split]
            self._check_columns(
                rows.column_names, f"Split {split!r} of data set {self.name!r}"
            )
            feature, place = (
                rows.features[self.label_column],
                Place([f"{self.name} ({split})"]),
            )
            column = rows.select_columns([self.label_column]).with_format("arrow")[:][
                self.label_column
            ]
            names = feature.names if isinstance(feature, ClassLabel) else None
            labels, classes = read_labels(column, names, self.label_column, place)
            try:
                images = rows.select_columns([self.image_column]).cast_column(
                    self.image_column, Image(decode=False)
                )
            except Exception as error:
                kind = rows.features[self.image_column]
                raise ValueError(
                    f"Column {self.image_column!r}, {kind}, cannot be read as images: {error}"
                ) from error
            tables[key] = Table(
                LabelledImages(
                    images, self.image_column, labels, self.wanted[key], place
                ),
                classes,
            )
        return tables

    def _folder(self, root: Path) -> dict[str, Table]:
        folders, files = _entries(root)
        parquet = _ending(root, files, ".parquet")
        for folder in folders:
            parquet += _ending(root / folder, _entries(root / folder)[1], ".parquet")
        if tables := self._tables_of_splits(parquet, root):
            return {
                key: _called(self._parquet(paths), self.wanted[key])
                for key, paths in tables.items()
            }
        matched = match_splits(folders, self.wanted)
        inside = _entries(root / matched["train"]) if "train" in matched else ([], [])
        in_folders = bool(inside[0] or set(METADATA) & set(inside[1]))
        lists = _ending(root, files, ".csv", ".tsv", *METADATA)
        tables = self._tables_of_splits(
            [path for path in lists if path.name not in METADATA], root
        )
        if tables and not (
            in_folders
            and not all(self._fits(path) for paths in tables.values() for path in paths)
        ):
            return {
                key: self._list(paths[0], self.wanted[key])
                for key, paths in tables.items()
            }
        lists = [path for path in lists + parquet if self._fits(path)]
        if len(lists) == 1:
            return self._table_of_all(lists[0])
        if in_folders:
            unread = [
                name
                for name in files
                if is_image_name(name) or name.lower().endswith((".csv", ".tsv"))
            ]
            self._note(
                [*(name for name in folders if name not in matched.values()), *unread]
            )
            return {
                key: self._class_folders(root / name, self.wanted[key])
                for key, name in matched.items()
            }
        if any(_entries(root / name)[0] for name in matched.values()):
            self._match(folders)
        columns = f"the columns {self.image_column!r} and {self.label_column!r}"
        if matched and set(folders) <= set(matched.values()):
            raise ValueError(
                f"Folder {str(root)!r} has no class folders in {folders}, nor a table with {columns}."
            )
        table = self._class_folders(root, "")
        if not len(table.images):
            raise ValueError(
                f"Folder {str(root)!r} holds neither train/CLASS/*.jpg nor CLASS/*.jpg nor a table with {columns}, "
                f"only {(folders + files)[:10]}."
            )
        return {"": table}

    def _class_folders(self, folder: Path, split: str) -> Table:
        folders, files = _entries(folder)
        metadata = [
            folder / name
            for name in METADATA
            if name in files and self._fits(folder / name)
        ]
        if metadata:
            return self._list(metadata[0], split)
        self._check_columns(
            ["image", "label"], f"Folder {str(folder)!r}, with a folder per class,"
        )
        loose = [str(folder / file) for file in filter(is_image_name, files)]
        if loose and self.strict:
            raise ValueError(
                f"Image {loose[0]!r} lies beside the class folders, like {len(loose) - 1} others. "
                "`--on-bad-image skip` leaves such images out."
            )
        others = [str(folder / file) for file in files if not is_image_name(file)]
        empty, paths, classes = [], [], []
        for name in folders:
            inner, files = _entries(folder / name)
            for image in (
                image
                for deeper in inner
                for image in _images_below(folder / name / deeper)
            ):
                raise ValueError(
                    f"Image {image!r} lies deeper than {name}/*: its class may be {name!r} or another."
                )
            images = [
                str(folder / name / file) for file in filter(is_image_name, files)
            ]
            others += [
                str(folder / name / file) for file in files if not is_image_name(file)
            ]
            empty += [] if images else [str(folder / name)]
            paths += images
            classes += [name] * len(images)
        labels, meaning = read_labels(
            pa.chunked_array([pa.array(classes, pa.string())]), None, "", Place([""])
        )
        skipped = {
            "beside the class folders": loose,
            "not an image by its name": others,
            "without images": empty,
        }
        return Table(
            _from_files(paths, labels, split),
            meaning,
            np.array(paths, dtype=object),
            skipped,
        )

    def _table_of_all(self, path: Path) -> dict[str, Table]:
        """Read one table of all splits, which its column `split` tells or, else, the first folder of each file."""
        if path.suffix.lower() == ".parquet":
            table, file = self._parquet([path]), pq.ParquetFile(path)
            has_splits = "split" in file.schema_arrow.names
            splits = (
                [str(split) for split in file.read(["split"])["split"].to_pylist()]
                if has_splits
                else []
            )
        else:
            table, rows = self._list(path, ""), [row for _, row in _rows(path)]
            has_splits = "split" in rows[0]
            splits = [str(row.get("split")) for row in rows] if has_splits else []
        if not has_splits and table.paths is not None:
            splits = [
                Path(os.path.relpath(file, path.parent)).parts[0]
                for file in table.paths
            ]
        if not has_splits and "train" not in match_splits(
            sorted(set(splits)), self.wanted
        ):
            return {"": table}
        matched = self._match(sorted(set(splits)))
        self._note(sorted(set(splits) - set(matched.values())))
        places = {
            key: np.flatnonzero(np.array(splits) == split)
            for key, split in matched.items()
        }
        tables = {
            key: _called(table.select(indices), self.wanted[key])
            for key, indices in places.items()
        }
        return {
            key: part if key == "train" else replace(part, skipped={})
            for key, part in tables.items()
        }

    def _list(self, path: Path, split: str) -> Table:
        """Read a table of image files, named relative to its folder or to the folder that is called like the table."""
        numbered = _rows(path)
        if not numbered:
            raise ValueError(f"{str(path)!r} has no rows.")
        rows = [row for _, row in numbered]
        place = Place([str(path)], lines=[line for line, _ in numbered])
        file_column = self._file_column(rows[0])
        self._check_columns(
            rows[0].keys() | ({self.image_column} if file_column else set()),
            repr(str(path)),
        )
        for index, row in enumerate(rows):
            if not isinstance(row.get(file_column), str) or not row[file_column]:
                raise ValueError(
                    f"Column {file_column!r} has no file name in {place(index)}."
                )
        base = path.parent
        if (
            not os.path.lexists(base / rows[0][file_column])
            and (base / path.stem).is_dir()
        ):
            base = base / path.stem
        paths = [os.path.normpath(base / row[file_column]) for row in rows]
        values = [
            None if row.get(self.label_column) == "" else row.get(self.label_column)
            for row in rows
        ]
        try:
            column = pa.chunked_array([pa.array(values)])
        except pa.ArrowException as error:
            raise ValueError(
                f"Column {self.label_column!r} of {str(path)!r} mixes kinds: {error}"
            ) from error
        labels, classes = read_labels(column, None, self.label_column, place)
        unlisted = (
            sorted(set(_images_below(path.parent)) - set(paths))
            if path.name in METADATA
            else []
        )
        images = _from_files(paths, labels, split, place)
        return Table(
            images,
            classes,
            np.array(paths, dtype=object),
            {f"not in {path.name}": unlisted},
        )

    def _parquet(self, paths: list[Path]) -> Table:
        labels, starts, names = {}, [], []
        for path in paths:
            try:
                file = pq.ParquetFile(path)
                self._check_columns(file.schema_arrow.names, repr(str(path)))
                column = file.read([self.label_column])[self.label_column]
                kind = file.schema_arrow.field(self.image_column).type
                if is_text(kind):
                    names += file.read([self.image_column])[
                        self.image_column
                    ].to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
            starts.append(sum(len(codes) for codes, _ in labels.values()))
            stated = stated_names(file.schema_arrow, self.label_column)
            labels[str(path)] = read_labels(
                column, stated, self.label_column, Place([str(path)])
            )
        codes, classes = unite(labels, self.label_column)
        indices, place = (
            np.concatenate(list(codes.values())),
            Place([str(path) for path in paths], np.array(starts)),
        )
        if names:
            files = [
                os.path.normpath(paths[0].parent / (name or ".")) for name in names
            ]
            return Table(
                _from_files(files, indices, "", place),
                classes,
                np.array(files, dtype=object),
            )
        filled = [
            str(path)
            for path, (codes, _) in zip(paths, labels.values(), strict=True)
            if len(codes)
        ]
        if not filled:
            raise ValueError(f"{str(paths[0])!r} has no rows.")
        try:
            images = load_dataset(
                "parquet",
                data_files=[
                    glob.escape(path) for path in filled
                ],  # names are patterns to it
                split="train",
                columns=[self.image_column],
                features=Features({self.image_column: Image(decode=False)}),
            )
        except Exception as error:
            raise ValueError(
                f"Column {self.image_column!r} of {str(paths[0])!r}, {kind}, cannot be read as images: "
                f"{error.__cause__ or error}"
            ) from error
        return Table(
            LabelledImages(images, self.image_column, indices, place=place), classes
        )

    def _tables_of_splits(self, paths: list[Path], root: Path) -> dict[str, list[Path]]:
        """Group tables by split: called after it, apart from the number of a shard, or in a folder called so."""
        groups: list[dict[str, list[Path]]] = [{}, {}]
        for path in paths:
            groups[0].setdefault(re.sub(r"[-_.]\d.*", "", path.stem), []).append(path)
            if path.parent != root:
                groups[1].setdefault(path.parent.name, []).append(path)
        for group in groups:
            matched = match_splits(group, self.wanted)
            if "train" in matched:
                tables = {key: sorted(group[name]) for key, name in matched.items()}
                for files in tables.values():
                    if len({file.parent for file in files}) > 1 or (
                        files[1:] and files[0].suffix != ".parquet"
                    ):
                        raise ValueError(
                            f"Which of these tables is the split: {[str(file) for file in files[:4]]}?"
                        )
                self._note(
                    [
                        str(path)
                        for path in paths
                        if path not in sum(tables.values(), [])
                    ]
                )
                return tables
        return {}

    def _match(self, found: Iterable[str]) -> dict[str, str]:
        matched = match_splits(found, self.wanted)
        if "train" not in matched:
            raise ValueError(
                f"Data set {self.name!r} has no split {self.wanted['train']!r}, only {list(found)[:10]}; "
                "`--train-split` names another."
            )
        return matched

    def _note(self, names: list[str]) -> None:
        if names:
            self.notes.append(
                f"Not read, as neither splits nor tables of them: {', '.join(map(repr, names[:10]))}."
            )

    def _check_columns(self, columns: Iterable[str], where: str) -> None:
        for flag, column in (
            ("--image-column", self.image_column),
            ("--label-column", self.label_column),
        ):
            if column not in columns:
                raise ValueError(
                    f"{where} has no column {column!r}, only {[*columns]}; choose one with `{flag}`."
                )
            if list(columns).count(column) > 1:
                raise ValueError(f"{where} has more than one column {column!r}.")

    def _file_column(self, columns: Iterable[str]) -> str:
        """Return the column with the names of image files, or nothing."""
        return next(
            (
                column
                for column in [self.image_column, *FILE_COLUMNS]
                if column in columns
            ),
            "",
        )

    def _fits(self, path: Path) -> bool:
        """Whether a table says which image is of which class."""
        parquet = path.suffix.lower() == ".parquet"
        try:
            columns = (
                pq.read_schema(path).names
                if parquet
                else next((row for _, row in _rows(path)), {})
            )
        except (ValueError, OSError):
            return False
        has_images = self.image_column in columns or (
            not parquet and self._file_column(columns)
        )
        return self.label_column in columns and bool(has_images)


def _called(table: Table, split: str) -> Table:
    return replace(table, images=replace(table.images, split=split))


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and files in a folder, sorted, without hidden ones and what macOS leaves."""
    with os.scandir(folder) as entries:
        shown = sorted(
            (unicodedata.normalize("NFC", entry.name), entry.name, entry.is_dir())
            for entry in entries
            if not entry.name.startswith(".") and entry.name != "__MACOSX"
        )
    for _, name, _ in shown:
        if name != name.encode(errors="replace").decode():
            raise ValueError(
                f"{str(folder / name)!r} has a name that is not UTF-8; rename it."
            )
    return [name for _, name, is_folder in shown if is_folder], [
        name for _, name, is_folder in shown if not is_folder
    ]


def _ending(folder: Path, files: list[str], *endings: str) -> list[Path]:
    return [folder / name for name in files if name.lower().endswith(endings)]


def _images_below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name != "__MACOSX"
        )
        yield from (
            os.path.join(parent, name) for name in sorted(files) if is_image_name(name)
        )


def _from_files(
    paths: list[str], labels: np.ndarray, split: str, place: Place | None = None
) -> LabelledImages:
    images = Dataset.from_dict({"image": paths}, Features({"image": Value("string")}))
    return LabelledImages(images, "image", labels, split, place)


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a CSV, TSV or JSON-lines file, each with its line."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return list(read_csv(path))
    if path.suffix.lower() != ".jsonl":
        raise ValueError(
            f"{str(path)!r} is neither a parquet nor a CSV nor a JSON-lines file."
        )
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            rows += [(number, dict(json.loads(line)))] if line.strip() else []
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is no JSON object: {error}"
            ) from error
    return rows
