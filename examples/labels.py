# SPDX-License-Identifier: Apache-2.0
"""What the labels of a column mean: class names where there are names, and the ids themselves where there are none."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass
class Classes:
    """Classes as one column has them.

    Attributes:
        names: Their names, in the order of the column's class indices.
        kind: What stands in the column: "class names", "integers" or "truth values".
        stated: Whether the data say which classes there are and in which order.
    """

    names: list[str]
    kind: str = "class names"
    stated: bool = False


def read_labels(
    column: pa.ChunkedArray,
    stated: list[str] | None,
    name: str,
    place: Callable[[int], str],
) -> tuple[np.ndarray, Classes]:
    """Read a column of labels.

    Args:
        column: Names, whole numbers or truth values.
        stated: The names of a `ClassLabel`, whose indices the column holds.
        name: Name of the column, for errors.
        place: Says where a row is found, for errors.

    Returns:
        (N,) class indices and their meaning.

    Raises:
        ValueError: If a label is missing or has no meaning. Row and column are named.
    """

    def refuse(wrong: pa.ChunkedArray | np.ndarray, what: str) -> None:
        rows = np.flatnonzero(np.asarray(wrong))
        if len(rows):
            raise ValueError(
                f"Column {name!r} has {what} in {place(int(rows[0]))} ({len(rows)} such in all)."
            )

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    refuse(column.is_null(), "no label")
    kind = column.type
    if is_text(kind):
        codes, values = _distinct(column.cast(pa.large_string()))
        names = [unicodedata.normalize("NFC", value) for value in values]
        refuse(
            np.array([not value.strip() for value in values], dtype=bool)[codes],
            "an empty label",
        )
        return codes, Classes(names)
    if pa.types.is_boolean(kind):
        codes, values = _distinct(column)
        return codes, Classes([str(value) for value in values], "truth values")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(
            f"Column {name!r} must hold class names or whole numbers, got {kind}."
        )
    codes, values = _distinct(
        column.cast(pa.float64()) if pa.types.is_floating(kind) else column
    )
    whole = np.array(
        [
            value == value and value not in (np.inf, -np.inf) and value == int(value)
            for value in values
        ]
    )
    refuse(~whole.astype(bool)[codes], "a label that is no whole number")
    refuse(
        np.array([value < 0 for value in values], dtype=bool)[codes],
        "a negative label, which says `without label`",
    )
    if stated is None:
        return codes, Classes([str(int(value)) for value in values], "integers")
    unknown = np.array([value >= len(stated) for value in values], dtype=bool)
    refuse(unknown[codes], f"a label beyond its {len(stated)} classes")
    names = [unicodedata.normalize("NFC", other) for other in stated]
    return np.array([int(value) for value in values], dtype=np.int64)[codes], Classes(
        names, stated=True
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, of which Arrow has three types."""
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )


def stated_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names that `datasets` left in a parquet file's schema for a `ClassLabel`."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"][
            "features"
        ]
        return (
            features[column]["names"]
            if features[column]["_type"] == "ClassLabel"
            else None
        )
    except (KeyError, TypeError, ValueError):
        return None


def unite(
    columns: dict[str, tuple[np.ndarray, Classes]], name: str
) -> tuple[dict[str, np.ndarray], Classes]:
    """Give the same class the same index in several columns, by its name.

    Args:
        columns: Class indices and their meaning in each part of the data, by its name.
        name: Name of the column, for errors.

    Returns:
        The class indices of each part, and what they mean now: stated classes in their order, then others, sorted.

    Raises:
        ValueError: If one part has names and another has numbers.
    """
    kinds = {classes.kind: part for part, (_, classes) in columns.items()}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} in {part!r}" for kind, part in kinds.items())
        raise ValueError(f"Column {name!r} has {found}, which cannot be matched.")
    stated = [
        other
        for _, classes in columns.values()
        if classes.stated
        for other in classes.names
    ]
    others = {
        other for _, classes in columns.values() for other in classes.names
    } - set(stated)
    # Numbers by their value: "10" comes after "9".
    others = sorted(
        others,
        key=lambda other: (
            not other.isdecimal(),
            int(other) if other.isdecimal() else 0,
            other,
        ),
    )
    names = list(dict.fromkeys([*stated, *others]))
    index = {other: i for i, other in enumerate(names)}
    united = {
        part: np.array([index[other] for other in classes.names], dtype=np.int64)[codes]
        for part, (codes, classes) in columns.items()
    }
    return united, Classes(names, next(iter(kinds)), bool(stated))


def _distinct(column: pa.ChunkedArray) -> tuple[np.ndarray, list]:
    """Return the distinct values of a column and, for each row, which it has."""
    values = pc.unique(column)
    return pc.index_in(column, value_set=values).to_numpy().astype(
        np.int64
    ), values.to_pylist()
