# SPDX-License-Identifier: Apache-2.0
"""Which images show one object: a column says so, or file names such as `rex_1` and `rex_2`."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .table import Request, Table, chained


#: What programs and people add to the name of a file when they copy or change it.
COPY = re.compile(
    r"([ ._-]*(\(\d+\)|copy|edited|aug|crop(ped)?|flip(ped)?|rot(ated)?)[ ._-]*\d*)+$",
    re.IGNORECASE,
)
#: The number of a view, of one object that has several.
VIEW = re.compile(r"[ ._-]+(\d{1,2}|[a-z])$", re.IGNORECASE)
#: More views of one object are taken for a plain numbering.
MOST_VIEWS = 12


def number_groups(
    request: Request, tables: list[Table], num_classes: int
) -> tuple[list[int] | None, str | None]:
    """Return the group (N,) of each image of the tables and what tells it; None for both if nothing does."""
    # A column that nobody named may hold something coarser than objects.
    more_than = 0 if request.group_column else num_classes
    numbers = _numbered(chained(tables, "groups"), more_than)
    if numbers is not None:
        return numbers, f"column {request.grouped_by!r}"
    request.grouped_by = None
    labels = chained(tables, "labels")
    numbers = _numbered(_objects(chained(tables, "paths"), labels), 0)
    return numbers, None if numbers is None else "file names"


def _numbered(values: Sequence[Any], more_than: int) -> list[int] | None:
    """Number the values, if any occurs twice and there are more than so many; what has none is on its own."""
    keys = [
        number if value in (None, "") else str(value)
        for number, value in enumerate(values)
    ]
    index = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if not more_than < len(index) < len(keys):
        return None
    return [index[key] for key in keys]


def _objects(paths: list[str | None], labels: list[str]) -> list[Any]:
    """Return what the files of each class call their objects."""
    members = defaultdict(list)
    for row, label in enumerate(labels):
        if paths[row] is not None:
            members[label].append(row)
    objects: list[Any] = [None] * len(paths)
    for label, rows in members.items():
        names = object_names([Path(str(paths[row])).stem for row in rows])
        for row, name in zip(rows, names, strict=True):
            objects[row] = label, name
    return objects


def object_names(stems: list[str]) -> list[str]:
    """Return what the file names of a class, without their endings, call the objects: `rex_1` and `rex_2 (1)` are rex.

    `owl_1`, `owl_2`, ... number the whole class and name no objects, nor does `IMG_2023_1` to `IMG_2023_99`.
    """
    plain = [COPY.sub("", stem) or stem for stem in stems]
    objects = [VIEW.sub("", stem) or stem for stem in plain]
    names = []
    views = Counter(objects)
    for whole, name in zip(plain, objects, strict=True):
        is_most = views[name] > len(stems) / 2
        numbers_class = is_most and not re.search(r"\d", name)
        is_object = views[name] <= MOST_VIEWS and not numbers_class
        names.append(name if is_object else whole)
    return names
