# SPDX-License-Identifier: Apache-2.0
"""From what a user has to `ImageData`: read, check, draw missing splits, number the classes."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
)

from ..descriptions import read_class_descriptions, warn_of_alike
from .checks import find_unreadable, refuse_shared_files
from .folders import find_descriptions, read_folder
from .hub import read_datasets, read_hub
from .image_data import ImageData
from .labels import renumber, tidy, unite
from .splits import draw_splits, object_names
from .table import Request, Table, preview
from .tables import read_table_of_all


def load_images(
    source: str | os.PathLike[str] | Dataset | DatasetDict,
    *,
    image_column: str = "image",
    label_column: str = "label",
    train_split: str = "train",
    validation_split: str = "validation",
    test_split: str = "test",
    on_bad_image: str = "error",
    descriptions: Any = None,
    seed: int = 0,
    group_column: str | None = None,
) -> ImageData:
    """Load labelled images in splits, with every image checked.

    A class is whatever an image, a `ClassLabel`, an empty class folder or the descriptions name, in any split.

    Args:
        source: A folder with images (`train/CLASS/*`, `test/CLASS/*`, or `CLASS/*`, which is split here), with parquet
            files or CSV files of file names called after the splits, or with one such table or `metadata.csv`; the
            table itself; a folder of `datasets`' `save_to_disk`; the id of a data set on the Hub; or a data set.
        image_column: Column of tables with the images, or with the names of their files.
        label_column: Column of tables with the classes: names or integers.
        train_split: Name of the split to train on.
        validation_split: Name of the split that chooses the epoch; it may be missing, and "none" ignores it.
        test_split: Name of the split that is reported.
        on_bad_image: "error", or "skip" to leave out and list what cannot be read or is outside the class folders.
        descriptions: Texts of the classes, in any shape that [`read_class_descriptions`] takes. Default:
            `descriptions.json` or `descriptions.csv` in the folder, if there is one.
        seed: Draws the splits where there are none.
        group_column: Column of tables that tells which images show one object. Default: the first of `group`,
            `group_id`, `object`, `object_id`, `concept`, `individual`, `individual_id`, `patient_id`, `sequence_id`,
            if it has more values than there are classes; or else files called `rex_1`, `rex_2` are a group.

    Raises:
        ValueError: If there is no such data set, split or column, if labels or images cannot be read, or if training
            and test have nothing in common. It names the file, row or column.
    """
    columns = image_column, label_column, group_column
    splits = {"train": train_split, "test": test_split, "validation": validation_split}
    request = _request(source, columns, splits, on_bad_image)
    return _load(request, descriptions, seed)


def _request(
    source: Any,
    columns: tuple[str, str, str | None],
    splits: dict[str, str],
    on_bad_image: str,
) -> Request:
    if on_bad_image not in ("error", "skip"):
        raise ValueError(
            f"`on_bad_image` must be 'error' or 'skip', got {on_bad_image!r}."
        )
    if splits["train"] in (splits["validation"], splits["test"]):
        found = ", ".join(f"{key}_split={name!r}" for key, name in splits.items())
        raise ValueError(f"`train_split` must differ from other splits, got {found}.")
    if splits["validation"] in ("", "none", splits["test"]):
        splits = {"train": splits["train"], "test": splits["test"]}
    return Request(source, splits, *columns, strict=on_bad_image == "error")


def _load(request: Request, descriptions: Any, seed: int) -> ImageData:
    tables = _read(request)
    if "" not in tables and "test" not in tables:
        found = [request.splits[key] for key in tables]
        raise ValueError(
            f"`source` {request.source!r} has no split {request.splits['test']!r}, only {found}; `test_split` names "
            "another. A folder of class folders without splits is split for you."
        )
    names, texts = _number_classes(request, tables, descriptions)
    skipped = _drop_unreadable(request, tables)
    grouped_by = _group(request, tables)
    if "" in tables:
        tables = _draw(request, tables[""], seed)
    refuse_shared_files(tables, request.splits)
    _check_splits(request, tables, names)
    parts = {key: _assemble(table, names) for key, table in tables.items()}
    return ImageData(
        parts["train"],
        parts.get("validation"),
        parts["test"],
        names,
        texts,
        skipped,
        request.notes,
        grouped_by,
    )


def _read(request: Request) -> dict[str, Table]:
    source = request.source
    if isinstance(source, (Dataset, DatasetDict)):
        request.source = type(source).__name__
        return read_datasets(request, source)
    request.source = name = os.fspath(source)
    path = Path(name if os.path.lexists(name) else os.path.expanduser(name)).absolute()
    try:
        if name and path.is_dir():
            request.root = path
            return read_folder(request, path)
        if path.is_file():
            request.root = path.parent
            return read_table_of_all(request, path)
    except OSError as error:
        raise ValueError(f"`source` {name!r} cannot be read: {error}") from error
    if not name or name.startswith((".", "/", "~")):
        raise ValueError(f"`source` {name!r} is not a folder.")
    return read_hub(request)


def _drop_unreadable(
    request: Request, tables: dict[str, Table]
) -> dict[str, dict[str, list[str]]]:
    """Leave out the images that cannot be read, or refuse them; return all that was left out so far."""
    found = find_unreadable(tables, request.splits)
    problems = [text for part in found.values() for text in part.values()]
    if problems and request.strict:
        lines = "\n".join(problems[:5])
        raise ValueError(
            f"{len(problems)} images of `source` {request.source!r} cannot be read; `on_bad_image='skip'` leaves them "
            f"out.\n{lines}"
        )
    skipped = {}
    for key, table in tables.items():
        reasons = dict(table.skipped)
        if found[key]:
            reasons["that cannot be read"] = [*found[key].values()]
            tables[key] = table.select(np.setdiff1d(table.rows, [*found[key]]))
        reasons = {reason: files for reason, files in reasons.items() if files}
        if reasons:
            skipped[key or "data"] = reasons
    return skipped


def _number_classes(
    request: Request, tables: dict[str, Table], descriptions: Any
) -> tuple[list[str], list[str] | dict[str, list[str]]]:
    """Give the same class the same index in all tables; return the names and the texts."""
    if descriptions is None and request.root:
        descriptions = find_descriptions(request.root)
    described = [] if descriptions is None else read_class_descriptions(descriptions)
    parts = {key: table.classes for key, table in tables.items()}
    united = unite(parts, request.label_column, map(tidy, described))
    for table in tables.values():
        table.labels = renumber(table.labels, table.classes, united)
        table.classes = united
    names = united.names
    warn_of_alike(names)
    if not isinstance(described, dict):
        return names, names
    texts = {tidy(name): entry for name, entry in described.items()}
    if missing := [name for name in names if name not in texts]:
        raise ValueError(
            f"`descriptions` has no entry for the classes {missing[:10]}; it has {[*texts][:10]}."
        )
    return names, {name: texts[name] for name in names}


def _group(request: Request, tables: dict[str, Table]) -> str | None:
    """Number the groups, by the column that tells them or else by names of files; return where they come from."""
    classes = len(next(iter(tables.values())).classes.names)
    values = {key: table.groups for key, table in tables.items()}
    # A column that nobody named may hold something coarser than objects.
    more_than = 0 if request.group_column else classes
    if request.grouped_by and _number_groups(tables, values, more_than):
        return f"column {request.grouped_by!r}"
    request.grouped_by = None
    objects = {key: _objects(table) for key, table in tables.items()}
    return "file names" if _number_groups(tables, objects, 0) else None


def _number_groups(
    tables: dict[str, Table], values: dict[str, list[Any] | None], more_than: int
) -> bool:
    """Number the values, if any occurs twice and there are more than so many; what has none is on its own."""
    index: dict[Any, int] = {}
    groups, repeated = {}, False
    for key, table in tables.items():
        part = values[key] or [None] * len(table.labels)
        part = [(key, n) if v in (None, "") else str(v) for n, v in enumerate(part)]
        groups[key] = [index.setdefault(value, len(index)) for value in part]
        repeated = repeated or len(set(part)) < len(part)
    known = repeated and len(index) > more_than
    for key, table in tables.items():
        table.groups = groups[key] if known else None
    return known


def _objects(table: Table) -> list[Any] | None:
    if table.paths is None:
        return None
    stems = np.array([Path(path).stem for path in table.paths], dtype=object)
    objects = np.empty(len(stems), dtype=object)
    for label in np.unique(table.labels):
        rows = table.labels == label
        objects[rows] = [
            f"{label} {name}" for name in object_names(stems[rows].tolist())
        ]
    return objects.tolist()


def _draw(request: Request, table: Table, seed: int) -> dict[str, Table]:
    groups = np.arange(len(table.labels)) if table.groups is None else table.groups
    groups = np.asarray(groups)[table.rows]
    parts = draw_splits(table.labels[table.rows], groups, seed)
    sizes = ", ".join(f"{len(rows)} for {part}" for part, rows in parts.items())
    note = f"The data have no splits: about 70, 10 and 20% of each class were drawn with seed {seed} ({sizes})"
    if together := sum(n for n in Counter(groups.tolist()).values() if n > 1):
        note += f"; {together} images that share an object stayed together"
    request.notes.append(f"{note}.")
    return {part: table.select(table.rows[rows]) for part, rows in parts.items()}


def _check_splits(request: Request, tables: dict[str, Table], names: list[str]) -> None:
    """Refuse splits that have nothing in common; note which classes and groups are where."""
    found = {
        key: [names[label] for label in np.unique(table.labels[table.rows])]
        for key, table in tables.items()
    }
    if len(found["train"]) < 2:
        raise ValueError(
            f"The training split {request.splits['train']!r} needs at least two classes, got {found['train']}."
        )
    if not found["test"]:
        raise ValueError(f"Split {request.splits['test']!r} has no images.")
    if not found.get("validation", True):
        del tables["validation"], found["validation"]
    for key, classes in found.items():
        if not set(classes) & set(found["train"]):
            raise ValueError(
                f"Split {request.splits[key]!r} has no image of a class of the training split, but of {classes[:10]}."
            )
    for key, what in (("train", "training"), ("test", "test")):
        present = set(found[key])
        lacking = [name for name in names if name not in present]
        have = "1 class has" if len(lacking) == 1 else f"{len(lacking)} classes have"
        if lacking:
            request.notes.append(f"{have} no {what} images: {preview(lacking)}.")
    if request.grouped_by:
        train, test = (
            set(np.array(tables[key].groups)[tables[key].rows].tolist())
            for key in ("train", "test")
        )
        if shared := train & test:
            request.notes.append(
                f"{len(shared)} values of {request.grouped_by!r} are in the training and in the test split."
            )


def _assemble(table: Table, names: list[str]) -> Dataset:
    features = {"label": ClassLabel(names=names), "file": Value("string")}
    columns: dict[str, Any] = {"label": table.labels, "file": table.files}
    if table.groups is not None:
        features["group"], columns["group"] = Value("int64"), table.groups
    more = Dataset.from_dict(columns, Features(features))
    images = table.images.cast_column("image", Image())
    rows = concatenate_datasets([images, more], axis=1)
    return rows if len(table.rows) == len(rows) else rows.select(table.rows)
