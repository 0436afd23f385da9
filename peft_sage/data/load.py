# SPDX-License-Identifier: Apache-2.0
"""From what a user has to `ImageData`: read, check, draw missing splits, number the classes."""

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image

from ..descriptions import WARNED, read_class_descriptions, warn_of_alike
from .checks import find_unreadable, refuse_shared_files
from .folders import find_descriptions, read_folder
from .groups import number_groups
from .hub import read_datasets, read_hub
from .image_data import ImageData
from .labels import natural_key, tidy
from .splits import draw_splits
from .table import Request, Table, labels_of, preview
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
    names, texts = _choose_classes(request, tables, descriptions)
    grouped_by = number_groups(request, tables, len(names))
    parts = _split(request, tables, names)
    _drop_unreadable(request, parts)
    if "" in parts:
        parts = _draw(request, parts[""], seed)
    refuse_shared_files(parts, request.splits)
    _check_splits(request, parts, names)
    data = {key: _finished(part) for key, part in parts.items()}
    return ImageData(
        data["train"],
        data.get("validation"),
        data["test"],
        names,
        texts,
        request.skipped,
        request.notes,
        grouped_by,
    )


def _read(request: Request) -> dict[str, Table]:
    source = request.source
    if isinstance(source, (Dataset, DatasetDict)):
        request.source = type(source).__name__
        return read_datasets(request, source)
    request.source = name = os.fspath(source)
    path = Path(name)
    if not os.path.lexists(path):
        path = path.expanduser()
    path = path.absolute()
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


def _choose_classes(
    request: Request, tables: dict[str, Table], descriptions: Any
) -> tuple[list[str], list[str] | dict[str, list[str]]]:
    """Return the names and the texts of the classes: ordered ones in their order, then others, sorted."""
    if descriptions is None and request.root:
        descriptions = find_descriptions(request.root)
    described: Any = []
    if descriptions is not None:
        with warnings.catch_warnings():
            # Of names that are alike one is told below, once.
            warnings.filterwarnings("ignore", "Classes whose names are alike")
            described = read_class_descriptions(descriptions)
    kinds: dict[str, str] = {}
    ordered: list[str] = []
    others = {tidy(name) for name in described}
    for key, table in tables.items():
        kinds |= {
            kind: repr(key) if key else file for kind, file in table.kinds.items()
        }
        others.update(table.labels)
        if table.ordered:
            ordered += table.classes
        else:
            others.update(table.classes)
    if len(kinds) > 1:
        found = " and ".join(f"{kind} in {place}" for kind, place in kinds.items())
        raise ValueError(
            f"Column {request.label_column!r} has {found}, which cannot be matched."
        )
    ordered = [tidy(name) for name in ordered]
    ordered += sorted(others, key=natural_key)
    names = [*dict.fromkeys(ordered)]
    warn_of_alike(names)
    WARNED.append(names)
    if not isinstance(described, dict):
        return names, names
    texts = {tidy(name): entry for name, entry in described.items()}
    if missing := [name for name in names if name not in texts]:
        is_file = isinstance(descriptions, (str, os.PathLike))
        file = repr(os.fspath(descriptions)) if is_file else "it"
        raise ValueError(
            f"`descriptions` has no entry for the classes {missing[:10]}, but for {[*texts][:10]}; add them to "
            f"{file}, or delete their folders, if they are empty, or their images."
        )
    return names, {name: texts[name] for name in names}


def _split(
    request: Request, tables: dict[str, Table], names: list[str]
) -> dict[str, Dataset]:
    """Return each split that there is, or all images under ""; ValueError if there is nothing to test on."""
    parts = {}
    for key, table in tables.items():
        if not table.labels and key == "validation":
            continue
        if not table.labels:
            split = request.splits.get(key, request.source)
            raise ValueError(f"Split {split!r} has no images.")
        rows = table.to_dataset(names)
        if table.splits is None:
            parts[key] = rows
            continue
        splits = np.array(table.splits, dtype=object)
        for name in request.splits:
            if name in table.splits:
                parts[name] = rows.select(np.flatnonzero(splits == name))
    if "" not in parts and "test" not in parts:
        found = [request.splits[key] for key in parts]
        raise ValueError(
            f"`source` {request.source!r} has no split {request.splits['test']!r}, only {found}; `test_split` names "
            "another. A folder of class folders without splits is split for you."
        )
    return parts


def _drop_unreadable(request: Request, parts: dict[str, Dataset]) -> None:
    """Leave out the images that cannot be read, or refuse them."""
    found = find_unreadable(parts, request.splits)
    problems = [text for part in found.values() for text in part.values()]
    if problems and request.strict:
        lines = "\n".join(problems[:5])
        raise ValueError(
            f"Images of `source` {request.source!r} cannot be read, {len(problems)} in all; `on_bad_image='skip'` "
            f"leaves them out.\n{lines}"
        )
    for key, unreadable in found.items():
        rows = np.arange(len(parts[key]))
        parts[key] = parts[key].select(np.setdiff1d(rows, [*unreadable]))
        request.skip(key, "that cannot be read", [*unreadable.values()])


def _draw(request: Request, data: Dataset, seed: int) -> dict[str, Dataset]:
    groups = np.arange(len(data))
    if "group" in data.features:
        groups = np.array(data["group"])
    drawn = draw_splits(labels_of(data), groups, seed)
    sizes = ", ".join(f"{len(rows)} for {part}" for part, rows in drawn.items())
    note = f"The data have no splits: about 70, 10 and 20% of each class were drawn with seed {seed} ({sizes})"
    sizes_of_groups = Counter(groups.tolist()).values()
    if together := sum(size for size in sizes_of_groups if size > 1):
        note += f"; {together} images that share an object stayed together"
    request.notes.append(f"{note}.")
    return {part: data.select(rows) for part, rows in drawn.items()}


def _check_splits(
    request: Request, parts: dict[str, Dataset], names: list[str]
) -> None:
    """Refuse splits that have nothing in common; note which classes and groups are where."""
    found = {
        key: [names[label] for label in np.unique(labels_of(part))]
        for key, part in parts.items()
    }
    if len(found["train"]) < 2:
        raise ValueError(
            f"The training split {request.splits['train']!r} needs at least two classes, got {found['train']}."
        )
    if not found["test"]:
        raise ValueError(f"Split {request.splits['test']!r} has no images.")
    if not found.get("validation", True):
        del parts["validation"], found["validation"]
    for key, classes in found.items():
        if not set(classes) & set(found["train"]):
            raise ValueError(
                f"Split {request.splits[key]!r} has no image of a class of the training split, but of {classes[:10]}."
            )
    present = {key: set(classes) for key, classes in found.items()}
    absent = {key: [n for n in names if n not in present[key]] for key in found}
    if absent["train"] == absent["test"]:
        request.notes += _note_absent(absent["train"], "training or test")
    else:
        request.notes += _note_absent(absent["train"], "training")
        request.notes += _note_absent(absent["test"], "test")
    if request.grouped_by:
        shared = set(parts["train"]["group"]) & set(parts["test"]["group"])
        if shared:
            request.notes.append(
                f"{len(shared)} values of {request.grouped_by!r} are in the training and in the test split."
            )


def _note_absent(names: list[str], where: str) -> list[str]:
    have = "1 class has" if len(names) == 1 else f"{len(names)} classes have"
    return [f"{have} no {where} images: {preview(names)}."] if names else []


def _finished(part: Dataset) -> Dataset:
    if "path" in part.features:
        part = part.remove_columns("path")
    return part.cast_column("image", Image())
