# SPDX-License-Identifier: Apache-2.0
"""What the labels of a column mean: class names where there are names, and the integers themselves otherwise."""

import json
import unicodedata
from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


#: What a column of labels may hold.
NAMES, INTEGERS = "class names", "integers"


def tidy(name: str) -> str:
    """Return a class name without the differences that nobody sees: white space, and how accents are encoded."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def read_labels(
    column: pa.ChunkedArray,
    class_names: list[str] | None,
    name: str,
    locate: Callable[[int], str],
) -> tuple[list[str], str]:
    """Read a column of labels.

    Args:
        column: Class names, truth values or integers.
        class_names: The names of a `ClassLabel`, whose indices the column holds.
        name: Name of the column, for errors.
        locate: Says where a row is, for errors.

    Returns:
        (N,) class names, and whether these are "class names" or "integers".

    Raises:
        ValueError: If a label is missing or has no meaning. Row and column are named.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if is_text(kind):
        column = column.cast(pa.large_string())
    elif not is_number and not pa.types.is_boolean(kind):
        raise ValueError(
            f"Column {name!r} must hold class names or integers, got {kind}."
        )
    distinct = pc.unique(column)
    codes = pc.index_in(column, value_set=distinct).to_numpy()
    names = []
    for code, value in enumerate(distinct.to_pylist()):
        if fault := _fault(value, class_names):
            rows = np.flatnonzero(codes == code).tolist()
            raise ValueError(
                f"Column {name!r} has {fault} in {locate(rows[0])} ({len(rows)} in all)."
            )
        value = int(value) if is_number else value
        names.append(tidy(class_names[value] if class_names else str(value)))
    labels = [names[code] for code in codes.tolist()]
    return labels, INTEGERS if is_number and not class_names else NAMES


def _fault(value: Any, class_names: list[str] | None) -> str | None:
    """Say what is wrong with a label, if something is."""
    if value is None or isinstance(value, str):
        return None if value and value.strip() else "no label"
    if not isfinite(value) or value != int(value):
        return f"a label that is not an integer ({value})"
    if value < 0:
        return f"a negative label ({value}), which stands for an image without label,"
    if class_names and value >= len(class_names):
        return f"a label ({value}) beyond its {len(class_names)} classes"
    return None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, of which Arrow has three types."""
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def class_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the names that `datasets` left in a parquet file's schema for a `ClassLabel`."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        feature = info["features"][column]
        return feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def natural_key(name: str) -> tuple[bool, int, str]:
    """Sort key by which "10" comes after "9"."""
    is_number = name.isdecimal()
    return not is_number, int(name) if is_number else 0, name
