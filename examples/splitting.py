# SPDX-License-Identifier: Apache-2.0
"""A split for data that have none: each class alike, images of one object together."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from reading import Table


#: What programs and people add to the name of a file when they copy or change it.
COPY = re.compile(
    r"([ ._-]*(\(\d+\)|copy|edited|aug|crop(ped)?|flip(ped)?|rot(ated)?)[ ._-]*\d*)+$",
    re.IGNORECASE,
)
#: The number of a view, of one object that has several.
VIEW = re.compile(r"[ ._-]+(\d{1,2}|[a-z])$", re.IGNORECASE)
#: More views of one object are taken for a plain numbering.
MOST_VIEWS = 12


def split_by_object(table: Table, seed: int) -> tuple[dict[str, Table], str]:
    """Draw about 70 % of each class for training, 10 % for validation and 20 % for testing, and say so.

    Every class of at least two objects has one in training and one in the test; a class of one is trained only.
    """
    labels = table.images.labels
    generator = np.random.default_rng(seed)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    together = 0
    by_class = (
        np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        if len(labels)
        else []
    )
    for members in by_class:
        names = (
            [str(index) for index in members]
            if table.paths is None
            else [table.paths[i] for i in members]
        )
        objects: dict[str, list[int]] = {}
        for index, key in zip(
            members, object_names([Path(name).stem for name in names]), strict=True
        ):
            objects.setdefault(key, []).append(int(index))
        groups = list(objects.values())
        together += sum(len(group) for group in groups if len(group) > 1)
        groups = sorted(
            (groups[i] for i in generator.permutation(len(groups))), key=len
        )
        room = {
            "test": max(0.2 * len(members), *(len(group) for group in groups[:1]), 0),
            "validation": 0.1 * len(members),
        }
        parts["train"] += groups.pop() if groups else []
        for i in generator.permutation(len(groups)):
            part = next(
                (part for part, size in room.items() if len(groups[i]) <= size + 0.5),
                "train",
            )
            parts[part] += groups[i]
            if part in room:
                room[part] -= len(groups[i])
    sizes = ", ".join(f"{len(indices)} for {part}" for part, indices in parts.items())
    note = f"The data have no splits: of each class about 70, 10 and 20 % were drawn with seed {seed} ({sizes})"
    note += (
        f"; {together} images that share an object by their file names stayed together."
        if together
        else "."
    )
    tables = {
        part: table.select(np.sort(np.array(indices, dtype=np.int64)))
        for part, indices in parts.items()
    }
    return {
        part: replace(t, images=replace(t.images, split=part))
        for part, t in tables.items()
    }, note


def object_names(stems: list[str]) -> list[str]:
    """Return what the file names of a class, without their endings, call the objects: `rex_1` and `rex_2 (1)` are rex.

    `owl_1`, `owl_2`, ... number the whole class and tell no objects, nor does `IMG_2023_1` to `IMG_2023_99`.
    """
    plain = [COPY.sub("", stem) or stem for stem in stems]
    objects = [VIEW.sub("", stem) or stem for stem in plain]
    views = Counter(objects)
    numbered = {
        name
        for name, count in views.items()
        if count > MOST_VIEWS
        or (count > len(stems) / 2 and not any(map(str.isdigit, name)))
    }
    return [
        whole if name in numbered else name
        for whole, name in zip(plain, objects, strict=True)
    ]
