# SPDX-License-Identifier: Apache-2.0
"""Tables of the names of image files (CSV, TSV, JSON lines), and tables of all splits.

They are not read by pandas or `datasets`, which make a number of the class 007 and a gap of the class NA.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..descriptions import read_csv, read_text
from .parquet import is_parquet, read_parquet
from .splits import match_splits
from .table import Request, Table


#: What the column with the names of image files may be called, where none has the name that was asked for.
FILE_COLUMNS = ["file_name", "filename", "file", "path", "image_path"]


def read_tables(request: Request, paths: dict[str, list[Path]]) -> dict[str, Table]:
    """Read the tables of each split: parquet files, of which it may have several, or one list of files."""
    parquet = {}
    tables = {}
    for key, files in paths.items():
        if is_parquet(files[0]):
            parquet[key] = files
        else:
            tables[key] = read_list(request, files[0])
    return tables | read_parquet(request, parquet)


def read_table_of_all(request: Request, path: Path) -> dict[str, Table]:
    """Read one table of all splits, which its column `split` or, else, the first folder of each file tells."""
    table = read_tables(request, {"": [path]})[""]
    found = [str(split) for split in table.splits or ()]
    if not found and table.paths:
        relative = [os.path.relpath(file, path.parent) for file in table.paths]
        found = [Path(file).parts[0] for file in relative]
        if "train" not in match_splits(found, request.splits):
            found = []
    table.splits = None
    if found:
        matched = request.match(sorted(set(found)))
        keys = {name: key for key, name in matched.items()}
        table.splits = [keys.get(name) for name in found]
    return {"": table}


def read_list(request: Request, path: Path) -> Table:
    """Read names of image files, relative to the table's folder or to the folder that is called like the table."""
    numbered = _rows(path)
    name = repr(request.relative(path))
    if not numbered:
        raise ValueError(f"{name} has no rows.")
    rows = [row for _, row in numbered]

    def locate(row: int) -> str:
        return f"line {numbered[row][0]} of {name}"

    file_column = _file_column(request, rows[0])
    found = {**rows[0], request.image_column: file_column} if file_column else rows[0]
    chosen = request.choose_columns(found, name)
    for index, row in enumerate(rows):
        if not isinstance(row.get(file_column), str) or not row[file_column]:
            raise ValueError(
                f"Column {file_column!r} has no file name in {locate(index)}."
            )
    base = path.parent
    inside = path.with_suffix("")
    if not os.path.lexists(base / rows[0][file_column]) and inside.is_dir():
        base = inside
    paths = [os.path.normpath(base / row[file_column]) for row in rows]
    try:
        picked = [{column: row.get(column) for column in chosen} for row in rows]
        columns = pa.Table.from_pylist(picked)
    except pa.ArrowException as error:
        raise ValueError(f"{name} mixes kinds in a column: {error}") from error
    files = [request.relative(file) for file in paths]
    return request.table(columns, files, locate, paths=paths)


def has_columns(request: Request, path: Path) -> bool:
    """Whether a table says which image is of which class."""
    try:
        if is_parquet(path):
            columns = pq.read_schema(path).names
            return {request.image_column, request.label_column} <= set(columns)
        first = next((row for _, row in _rows(path)), {})
    except (ValueError, OSError):
        return False
    return request.label_column in first and bool(_file_column(request, first))


def _file_column(request: Request, columns: Iterable[str]) -> str:
    """Return the column with the names of image files, or nothing."""
    candidates = [request.image_column, *FILE_COLUMNS]
    return next((column for column in candidates if column in columns), "")


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
        if not line.strip():
            continue
        try:
            rows.append((number, dict(json.loads(line))))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is not a JSON object: {error}"
            ) from error
    return rows
