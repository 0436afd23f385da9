# SPDX-License-Identifier: Apache-2.0
"""From what a user has to `ImageData`: read, check, draw missing splits, number the classes."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Image, load_from_disk

from ..descriptions import read_class_descriptions, tidy
from .checks import find_unreadable, refuse_shared_files
from .folders import find_descriptions, read_folder
from .groups import number_groups
from .image_data import ImageData
from .labels import natural_key
from .splits import draw_splits
from .table import Request, Table, join, labels_of, preview
from .tables import read_datasets, read_hub, read_table


#: What a folder holds that `save_to_disk` of `datasets` wrote: one data set, or splits.
SAVED = ("state.json", "dataset_dict.json")


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
            files or CSV files of file names called after the splits, or with one such table; the table itself; the id
            of a data set on the Hub; or whatever `datasets` has loaded, or saved in a folder.
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
    if on_bad_image not in ("error", "skip"):
        raise ValueError(
            f"`on_bad_image` must be 'error' or 'skip', got {on_bad_image!r}."
        )
    if train_split in (validation_split, test_split):
        found = ", ".join(f"{key}_split={name!r}" for key, name in splits.items())
        raise ValueError(f"`train_split` must differ from other splits, got {found}.")
    if validation_split in ("", "none", test_split):
        del splits["validation"]
    request = Request(source, splits, *columns, strict=on_bad_image == "error")
    return _load(request, descriptions, seed)


def _load(request: Request, descriptions: Any, seed: int) -> ImageData:
    tables = _read(request)
    names, texts = _choose_classes(request, tables, descriptions)
    groups, grouped_by = number_groups(request, tables, len(names))
    data = _without_unreadable(request, join(tables, names, groups))
    splits = np.array(data["split"])
    if not splits.any():
        splits = _draw(request, data, seed)
    parts = {}
    for key in request.splits:
        rows = np.flatnonzero(splits == key)
        if len(rows):
            parts[key] = data.select(rows)
    refuse_shared_files(parts, request.splits)
    _check_splits(request, parts, names)
    finished = {
        key: part.remove_columns(["path", "split"]).cast_column("image", Image())
        for key, part in parts.items()
    }
    return ImageData(
        finished["train"],
        finished.get("validation"),
        finished["test"],
        names,
        texts,
        request.skipped,
        request.notes,
        grouped_by,
    )


def _read(request: Request) -> list[Table]:
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
        if any((path / file).is_file() for file in SAVED):
            return read_datasets(request, load_from_disk(path))
        if name and path.is_dir():
            request.root = path
            return read_folder(request, path)
        if path.is_file():
            request.root = path.parent
            return read_table(request, [path], "")
    except OSError as error:
        raise ValueError(f"`source` {name!r} cannot be read: {error}") from error
    if not name or name.startswith((".", "/", "~")):
        raise ValueError(f"`source` {name!r} is not a folder.")
    return read_hub(request)


def _choose_classes(
    request: Request, tables: list[Table], descriptions: Any
) -> tuple[list[str], list[str] | dict[str, list[str]]]:
    """Return the names and the texts of the classes: ordered ones in their order, then others, sorted."""
    if descriptions is None and request.root:
        descriptions = find_descriptions(request.root)
    described: Any = (
        [] if descriptions is None else read_class_descriptions(descriptions)
    )
    ordered: list[str] = []
    written: dict[str, Any] = (
        described if isinstance(described, dict) else dict.fromkeys(described)
    )
    written = {tidy(name): entry for name, entry in written.items()}
    others = {*written}
    kinds = {}
    for table in tables:
        others.update(table.labels)
        if table.ordered:
            ordered += map(tidy, table.classes)
        else:
            others.update(table.classes)
        if table.files:
            kinds[table.kind] = table.files[0]
    if len(kinds) > 1:
        found = " and ".join(f"{kind} ({file})" for kind, file in kinds.items())
        raise ValueError(
            f"Column {request.label_column!r} has {found}, which cannot be matched."
        )
    names = [*dict.fromkeys(ordered + sorted(others, key=natural_key))]
    if not isinstance(described, dict):
        return names, names
    if missing := [name for name in names if name not in written]:
        is_file = isinstance(descriptions, (str, os.PathLike))
        file = repr(os.fspath(descriptions)) if is_file else "it"
        raise ValueError(
            f"`descriptions` has no entry for the classes {missing[:10]}, but for {[*written][:10]}; add them to "
            f"{file}, or delete their folders, if they are empty, or their images."
        )
    return names, {name: written[name] for name in names}


def _without_unreadable(request: Request, data: Dataset) -> Dataset:
    """Leave out the images that are in no split, and those that cannot be read, or refuse these."""
    asked = np.array([split is not None for split in data["split"]], dtype=bool)
    if not asked.all():
        data = data.select(np.flatnonzero(asked))
    unreadable = find_unreadable(data, request.splits)
    if unreadable and request.strict:
        lines = "\n".join([*unreadable.values()][:5])
        raise ValueError(
            f"Images of `source` {request.source!r} cannot be read, {len(unreadable)} in all; `on_bad_image='skip'` "
            f"leaves them out.\n{lines}"
        )
    splits = data["split"][:]
    found: dict[str, list[str]] = {}
    for row, problem in unreadable.items():
        found.setdefault(splits[row], []).append(problem)
    for key, problems in found.items():
        request.skip(key, "that cannot be read", problems)
    return data.select(np.setdiff1d(np.arange(len(data)), [*unreadable]))


def _draw(request: Request, data: Dataset, seed: int) -> np.ndarray:
    """Return the keys (N,) of splits that are drawn."""
    groups = np.arange(len(data))
    if "group" in data.features:
        groups = np.array(data["group"])
    splits = draw_splits(labels_of(data), groups, seed)
    sizes = ", ".join(
        f"{(splits == part).sum()} for {part}"
        for part in ("train", "validation", "test")
    )
    note = f"The data have no splits: about 70, 10 and 20% of each class were drawn with seed {seed} ({sizes})"
    sizes_of_groups = Counter(groups.tolist()).values()
    if together := sum(size for size in sizes_of_groups if size > 1):
        note += f"; {together} images that share an object stayed together"
    request.notes.append(f"{note}.")
    return splits


def _check_splits(
    request: Request, parts: dict[str, Dataset], names: list[str]
) -> None:
    """Refuse splits that lack images or have nothing in common; note which classes and groups are where."""
    for key in ("train", "test"):
        if key not in parts:
            others = [request.splits[part] for part in parts]
            raise ValueError(
                f"`source` {request.source!r} has no images in a split {request.splits[key]!r}, only in {others}; "
                f"`{key}_split` names another. A folder of class folders without splits is split for you."
            )
    found = {key: set(labels_of(part).tolist()) for key, part in parts.items()}

    def named(labels: Iterable[int]) -> list[str]:
        return [names[label] for label in sorted(labels)]

    if len(found["train"]) < 2:
        raise ValueError(
            f"The training split {request.splits['train']!r} needs at least two classes, got {named(found['train'])}."
        )
    for key, labels in found.items():
        if not labels & found["train"]:
            raise ValueError(
                f"Split {request.splits[key]!r} has no image of a class of the training split, but of "
                f"{named(labels)[:10]}."
            )
    untrained = named({*range(len(names))} - found["train"])
    untested = named({*range(len(names))} - found["test"])
    if untrained == untested:
        request.notes += _note_absent(untrained, "training or test")
    else:
        request.notes += _note_absent(untrained, "training")
        request.notes += _note_absent(untested, "test")
    if request.grouped_by:
        shared = set(parts["train"]["group"]) & set(parts["test"]["group"])
        if shared:
            request.notes.append(
                f"{len(shared)} values of {request.grouped_by!r} are in the training and in the test split."
            )


def _note_absent(names: list[str], where: str) -> list[str]:
    have = "1 class has" if len(names) == 1 else f"{len(names)} classes have"
    return [f"{have} no {where} images: {preview(names)}."] if names else []
