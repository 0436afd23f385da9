# SPDX-License-Identifier: Apache-2.0
"""Parquet files with images, or with names of image files."""

import glob
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, load_dataset

from .labels import class_label_names, is_text
from .table import Request, Table, encoded, merge


def is_parquet(path: str | Path) -> bool:
    return str(path).lower().endswith(".parquet")


def read_parquet(request: Request, paths: dict[str, list[Path]]) -> dict[str, Table]:
    """Read the labels of each file, whose `ClassLabel`s may differ, and by `datasets` the images of all."""
    tables = {}
    with_images = {}
    for key, files in paths.items():
        parts = {path: _read_columns(request, path) for path in files}
        filled = [path for path, part in parts.items() if part.files]
        if not filled:
            raise ValueError(f"{request.relative(files[0])!r} has no rows.")
        tables[key] = merge([parts[path] for path in filled])
        if tables[key].paths is None:
            with_images[key] = filled
    for key, images in _read_images(request, with_images).items():
        tables[key].images = images
    return tables


def _read_columns(request: Request, path: Path) -> Table:
    """Read all but the images."""
    name = request.relative(path)
    image = request.image_column
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        columns = file.read(request.choose_columns(schema.names, repr(name)))
        names = None
        if is_text(schema.field(image).type):
            names = file.read([image])[image].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{name!r} cannot be read: {error}") from error
    rows = [f"row {row} of {name}" for row in range(len(columns))]
    classes = class_label_names(schema, request.label_column)
    table = request.table(columns, rows, rows.__getitem__, classes)
    if names is not None:
        table.paths = [os.path.normpath(path.parent / (file or ".")) for file in names]
        table.files = [request.relative(file) for file in table.paths]
    return table


def _read_images(request: Request, paths: dict[str, list[Path]]) -> dict[str, Dataset]:
    if not paths:
        return {}
    image = request.image_column
    files = {}
    for key, several in paths.items():
        # Names are patterns to `datasets`.
        files[key or "train"] = [glob.escape(str(path)) for path in several]
    features = Features({image: Image(decode=False)})
    try:
        loaded = load_dataset(
            "parquet", data_files=files, columns=[image], features=features
        )
    except Exception as error:
        first = next(iter(paths.values()))[0]
        kind = pq.read_schema(first).field(image).type
        raise ValueError(
            f"Column {image!r} of {request.relative(first)!r}, {kind}, cannot be read as images: "
            f"{error.__cause__ or error}"
        ) from error
    return {key: encoded(loaded[key or "train"], image) for key in paths}
