# SPDX-License-Identifier: Apache-2.0
"""Tables of images, or of the names of image files: CSV, JSON lines, parquet, and data sets of `datasets`."""

import glob
import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import datasets.config
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import HfApi

from ..descriptions import read_csv, read_text
from .labels import read_labels
from .splits import match_splits
from .table import Request, Table, encoded, images_of_files, preview


#: Tables of file names.
LISTS = (".csv", ".tsv", ".jsonl")


def is_parquet(path: str | Path) -> bool:
    return str(path).lower().endswith(".parquet")


def has_columns(request: Request, path: Path) -> bool:
    """Whether a table says which image is of which class."""
    try:
        request.find_image_column(_header(path), "")
    except (ValueError, OSError):
        return False
    return True


def _header(path: Path) -> list[str]:
    if is_parquet(path):
        return pq.read_schema(path).names
    _, first = next(_read_list(path), (0, {}))
    return [*first]


def _read_list(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table of file names, each with its line."""
    if path.suffix.lower() != ".jsonl":
        yield from read_csv(path)
        return
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        try:
            if text.strip():
                yield line, dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r}: line {line} is not a JSON object: {error}"
            ) from error


def read_table(request: Request, paths: list[Path], key: str) -> list[Table]:
    """Read the table of a split, which may be in several parquet files; the key "" stands for all images."""
    if is_parquet(paths[0]):
        return _read_parquet(request, paths, key)
    path = paths[0]
    if path.suffix.lower() not in LISTS:
        raise ValueError(
            f"{str(path)!r} is neither a parquet nor a CSV, TSV or JSON lines file."
        )
    # Not by `datasets`, which makes a number of the class 007 and a gap of the class NA.
    numbered = [*_read_list(path)]
    name = repr(request.relative(path))
    if not numbered:
        raise ValueError(f"{name} has no rows.")
    data = Dataset.from_list([row for _, row in numbered])
    rows = [f"line {line} of {name}" for line, _ in numbered]
    return [read_rows(request, data, rows, name, key, path.parent)]


def _read_parquet(request: Request, paths: list[Path], key: str) -> list[Table]:
    name = preview(repr(request.relative(path)) for path in paths)
    parts = []
    try:
        # The `ClassLabel`s of two files may differ, and `datasets` would take those of the first.
        for _, part in groupby(paths, _metadata):
            files = [*part]
            rows = []
            for path in files:
                count = pq.read_metadata(path).num_rows
                rows += [f"row {i} of {request.relative(path)}" for i in range(count)]
            # Names are patterns to `datasets`.
            patterns = [glob.escape(str(path)) for path in files]
            data = Dataset.from_parquet(patterns, split=key or "train")
            parts.append((data, rows))
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"{name} cannot be read: {reason}") from error
    folder = paths[0].parent
    return [read_rows(request, x, rows, name, key, folder) for x, rows in parts]


def _metadata(path: Path) -> dict[bytes, bytes] | None:
    return pq.read_schema(path).metadata


def read_hub(request: Request) -> list[Table]:
    """Read a data set of the Hub; a mistyped folder is refused at once, which `load_dataset` offline is slow to do."""
    source = request.source
    fault = "is neither a folder nor on the Hub"
    try:
        HfApi().dataset_info(source, timeout=5)
    except Exception as error:
        cached = Path(datasets.config.HF_DATASETS_CACHE, source.replace("/", "___"))
        if not cached.is_dir():
            raise ValueError(f"`source` {source!r} {fault}: {error}") from error
    try:
        data = load_dataset(source)
    except Exception as error:
        raise ValueError(f"`source` {source!r} {fault}: {error}") from error
    return read_datasets(request, data)


def read_datasets(request: Request, data: Dataset | DatasetDict) -> list[Table]:
    """Read splits of `datasets`, or a data set of all images."""
    if isinstance(data, Dataset):
        splits = {"": ("the data set", data)}
    else:
        matched = request.match(data)
        splits = {key: (name, data[name]) for key, name in matched.items()}
    tables = []
    for key, (name, split) in splits.items():
        rows = [f"row {row} of {name}" for row in range(len(split))]
        tables.append(read_rows(request, split, rows, f"Split {name!r}", key))
    return tables


def read_rows(
    request: Request,
    data: Dataset,
    rows: list[str],
    name: str,
    key: str,
    folder: Path | None = None,
) -> Table:
    """Read the rows of a data set.

    Args:
        request: What to read.
        data: Its columns are images, or names of image files, and labels; groups and splits, maybe.
        rows: (N,) where each row is, for errors.
        name: What errors call the data set.
        key: The key of its split; "" if all images are in it, and a column `split` may tell.
        folder: Where the image files are; without it they are in the data set.
    """
    image = request.find_image_column(data.column_names, name)
    labels, kind = read_labels(data, request.label_column, rows)
    files = rows
    paths: list[str | None] = [None] * len(data)
    if folder is not None and "string" in getattr(data.features[image], "dtype", ""):
        files = data.with_format(None)[image][:]
        if not all(files):
            where = next(row for row, file in zip(rows, files, strict=True) if not file)
            raise ValueError(f"Column {image!r} has no file name in {where}.")
        found = [os.path.normpath(folder / file) for file in files]
        files = [request.relative(path) for path in found]
        images = images_of_files(found)
        paths = [*found]
    else:
        try:
            images = encoded(data, image)
        except Exception as error:
            raise ValueError(
                f"Column {image!r} of {name}, {data.features[image]}, cannot be read as images: {error}"
            ) from error
    classes = getattr(data.features[request.label_column], "names", [])
    splits = _splits(request, data, key, files)
    groups = request.find_groups(data)
    return Table(labels, kind, files, paths, images, splits, groups, classes, True)


def _splits(
    request: Request, data: Dataset, key: str, files: list[str]
) -> list[str | None]:
    """Return the key of each row's split, by the column `split` or by the files' first folders if these are splits."""
    if key:
        return [key] * len(data)
    if "split" in data.column_names:
        names = [str(split) for split in data.with_format(None)["split"][:]]
        matched = request.match(sorted(set(names)))
    else:
        names = [Path(file).parts[0] for file in files]
        matched = match_splits(sorted(set(names)), request.splits)
        if not {"train", "test"} <= set(matched):
            return [""] * len(data)
    keys = {split: key for key, split in matched.items()}
    return [keys.get(split) for split in names]
