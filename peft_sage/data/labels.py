# SPDX-License-Identifier: Apache-2.0
"""What the labels of a column mean: class names where there are names, and the integers themselves otherwise."""

from math import isfinite
from typing import Any

from datasets import Dataset

from ..descriptions import tidy


#: What a column of labels may hold.
NAMES, INTEGERS = "class names", "integers"


def read_labels(data: Dataset, column: str, rows: list[str]) -> tuple[list[str], str]:
    """Read a column of class names, truth values, integers or the indices of a `ClassLabel`.

    Args:
        data: The data set.
        column: Name of the column.
        rows: (N,) where each row is, for errors.

    Returns:
        (N,) class names, and whether these are "class names" or "integers".

    Raises:
        ValueError: If a label is missing or has no meaning. Row and column are named.
    """
    class_names = getattr(data.features[column], "names", None)
    values = data.with_format(None)[column][:]
    kinds = {type(value) for value in values if value is not None}
    if not kinds <= {str, bool, int, float}:
        raise ValueError(
            f"Column {column!r} must hold class names or integers, got {data.features[column]}."
        )
    names = {}
    for value in dict.fromkeys(values):
        if fault := _fault(value, class_names):
            same = [
                where
                for where, other in zip(rows, values, strict=True)
                if other is value or other == value
            ]
            raise ValueError(
                f"Column {column!r} has {fault} in {same[0]} ({len(same)} in all)."
            )
        name = str(int(value) if kinds & {int, float} else value)
        names[value] = tidy(class_names[value] if class_names else name)
    is_number = bool(kinds & {int, float}) and not class_names
    return [names[value] for value in values], INTEGERS if is_number else NAMES


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


def natural_key(name: str) -> tuple[bool, int, str]:
    """Sort key by which "10" comes after "9"."""
    is_number = name.isdecimal()
    return not is_number, int(name) if is_number else 0, name
