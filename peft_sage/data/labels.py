# SPDX-License-Identifier: Apache-2.0
"""What the labels of a column mean: class names where there are names, and the integers themselves otherwise."""

import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass
class Classes:
    """Classes as one table has them.

    Attributes:
        names: Their names, in the order of the table's class indices; a name may occur twice.
        kind: What stands in the column: "class names" or "integers".
        stated: Whether the data say which classes there are and in which order.
    """

    names: list[str]
    kind: str = "class names"
    stated: bool = False


def tidy(name: str) -> str:
    """Return a class name without the differences that nobody sees: white space, and how accents are encoded."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def read_labels(
    column: pa.ChunkedArray,
    stated: list[str] | None,
    name: str,
    locate: Callable[[int], str],
) -> tuple[np.ndarray, Classes]:
    """Read a column of labels.

    Args:
        column: Class names, truth values or integers.
        stated: The names of a `ClassLabel`, whose indices the column holds.
        name: Name of the column, for errors.
        locate: Says where a row is, for errors.

    Returns:
        (N,) class indices and their meaning.

    Raises:
        ValueError: If a label is missing or has no meaning. Row and column are named.
    """

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    has_names = is_text(column.type) or pa.types.is_boolean(column.type)
    if is_text(column.type):
        column = column.cast(pa.large_string())
    elif not (
        has_names
        or pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
    ):
        raise ValueError(
            f"Column {name!r} must hold class names or integers, got {column.type}."
        )
    distinct = pc.unique(column)
    codes = pc.index_in(column, value_set=distinct).to_numpy().astype(np.int64)
    values = distinct.to_pylist()
    for index, value in enumerate(values):
        if fault := _fault(value, stated):
            rows = np.flatnonzero(codes == index).tolist()
            raise ValueError(
                f"Column {name!r} has {fault} in {locate(rows[0])} ({len(rows)} in all)."
            )
    if has_names:
        return codes, Classes([tidy(str(value)) for value in values])
    indices = [int(value) for value in values]
    if stated is None:
        return codes, Classes([str(index) for index in indices], "integers")
    return np.array(indices, np.int64)[codes], Classes(
        [*map(tidy, stated)], stated=True
    )


def _fault(value: Any, stated: list[str] | None) -> str | None:
    """Say what is wrong with a label, if something is."""
    if value is None or isinstance(value, str):
        return None if value and value.strip() else "no label"
    if not isfinite(value) or value != int(value):
        return f"a label that is not an integer ({value})"
    if value < 0:
        return f"a negative label ({value}), which stands for an image without label,"
    if stated is not None and value >= len(stated):
        return f"a label ({value}) beyond its {len(stated)} classes"
    return None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, of which Arrow has three types."""
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def stated_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names that `datasets` left in a parquet file's schema for a `ClassLabel`."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        feature = info["features"][column]
        return feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def unite(parts: dict[str, Classes], name: str, more: Iterable[str] = ()) -> Classes:
    """Return the classes of several parts of the data, each once: stated ones in their order, then others, sorted.

    Args:
        parts: The classes of each part, by its name.
        name: Name of the column, for errors.
        more: Further names.

    Raises:
        ValueError: If one part has names and another has numbers.
    """
    kinds = {classes.kind: part for part, classes in parts.items()}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} in {part!r}" for kind, part in kinds.items())
        raise ValueError(f"Column {name!r} has {found}, which cannot be matched.")
    stated = [n for part in parts.values() if part.stated for n in part.names]
    others = {n for part in parts.values() for n in part.names}.union(more)
    names = dict.fromkeys([*stated, *sorted(others, key=_natural_key)])
    return Classes([*names], next(iter(kinds)), bool(stated))


def renumber(labels: np.ndarray, classes: Classes, united: Classes) -> np.ndarray:
    """Return (N,) indices of the same classes among the united ones."""
    index = {name: number for number, name in enumerate(united.names)}
    return np.array([index[name] for name in classes.names], np.int64)[labels]


def _natural_key(name: str) -> tuple[bool, int, str]:
    # Numbers by their value: "10" comes after "9".
    is_number = name.isdecimal()
    return not is_number, int(name) if is_number else 0, name
