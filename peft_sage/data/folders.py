# SPDX-License-Identifier: Apache-2.0
"""What a folder is: tables of splits, one table, folders of splits, or class folders.

A split is one only where it is meant as such: the first folder of `train/CLASS/*.jpg`, a table's name, a column
`split`; never a word somewhere in a path, as it is to `datasets`.
"""

import mimetypes
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..pictures import is_image_name, is_shown
from .hub import SAVED, read_saved
from .labels import NAMES, tidy
from .parquet import is_parquet
from .splits import match_splits
from .table import Request, Table, preview
from .tables import has_columns, read_list, read_table_of_all, read_tables


#: Tables of files in an image folder, as `datasets` has them.
METADATA = ["metadata.csv", "metadata.jsonl"]
#: Texts of the classes, which are no table of images.
DESCRIPTIONS = ["descriptions.json", "descriptions.csv"]
#: What Windows leaves in folders.
LEFTOVERS = ["thumbs.db", "desktop.ini"]


def read_folder(request: Request, root: Path) -> dict[str, Table]:
    """Return the splits under the keys of `request.splits`, as far as there are any, or all images under ""."""
    folders, files = _entries(root)
    if SAVED & set(files):
        return read_saved(request)
    tables = [root / name for name in files if is_table(name)]
    for name in folders:
        inner = _entries(root / name)[1]
        tables += [root / name / file for file in inner if is_parquet(file)]
    fitting = [path for path in tables if has_columns(request, path)]
    matched = match_splits(folders, request.splits)
    has_class_folders = False
    if "train" in matched:
        inner_folders, inner_files = _entries(root / matched["train"])
        has_metadata = not set(METADATA).isdisjoint(inner_files)
        has_class_folders = bool(inner_folders) or has_metadata
    for found in (fitting, [] if has_class_folders else tables):
        if splits := _tables_of_splits(request, found):
            used = {path for paths in splits.values() for path in paths}
            unread = [request.relative(path) for path in fitting if path not in used]
            request.note_unread(unread)
            return read_tables(request, splits)
    if len(fitting) == 1:
        return read_table_of_all(request, fitting[0])
    if has_class_folders:
        unread = [name for name in folders if name not in matched.values()]
        unread += [file for file in files if is_table(file) or is_image_name(file)]
        request.note_unread(unread)
        return {k: _class_folders(request, root / v, k) for k, v in matched.items()}
    return _without_splits(request, root, [*matched.values()])


def is_table(name: str) -> bool:
    """Whether a file may be a table of images by its name."""
    is_list = name.lower().endswith((".csv", ".tsv")) or name in METADATA
    return name not in DESCRIPTIONS and (is_list or is_parquet(name))


def find_descriptions(root: Path) -> Path | None:
    """Return the file with the texts of the classes that a folder has, if it has one."""
    files = [root / name for name in DESCRIPTIONS]
    return next((path for path in files if path.is_file()), None)


def _without_splits(
    request: Request, root: Path, matched: list[str]
) -> dict[str, Table]:
    folders, files = _entries(root)
    if any(_entries(root / name)[0] for name in matched):
        request.match(folders)  # raises, as there is nothing to train on
    columns = f"the columns {request.image_column!r} and {request.label_column!r}"
    if matched and set(folders) <= set(matched):
        raise ValueError(
            f"Folder {str(root)!r} has no class folders in {folders}, nor a table with {columns}."
        )
    table = _class_folders(request, root, "")
    if not len(table.labels):
        raise ValueError(
            f"Folder {str(root)!r} contains neither train/CLASS/*.jpg nor CLASS/*.jpg nor a table with {columns}, "
            f"only {(folders + files)[:10]}."
        )
    return {"": table}


def _class_folders(request: Request, folder: Path, key: str) -> Table:
    """Read a folder per class; an empty one is a class, too, but not one with other files only."""
    folders, files = _entries(folder)
    for path in [folder / name for name in METADATA if name in files]:
        if has_columns(request, path):
            table = read_list(request, path)
            unlisted = sorted(set(_below(folder)) - set(table.paths or ()))
            names = [request.relative(file) for file in unlisted]
            request.skip(key, f"not listed in {path.name}", names)
            return table
    where = f"Folder {str(folder)!r}, with a folder per class,"
    request.choose_columns(["image", "label"], where)
    loose = [request.relative(folder / name) for name in filter(is_image_name, files)]
    if loose and request.strict:
        raise ValueError(
            f"Image {loose[0]!r} is outside the class folders, like {len(loose) - 1} others; `on_bad_image='skip'` "
            "leaves such images out."
        )
    classes: list[str] = []
    labels: list[str] = []
    paths: list[str] = []
    others = []
    unread = []
    for name in folders:
        inner, files = _entries(folder / name)
        deep = [path for one in inner for path in _below(folder / name / one)]
        if deep:
            raise ValueError(
                f"Image {request.relative(deep[0])!r} lies deeper than {name}/*: its class may be {name!r} or another."
            )
        images = [folder / name / file for file in files if is_image_name(file)]
        rest = [folder / name / file for file in files if not is_image_name(file)]
        others += [request.relative(x) for x in rest if _may_be_image(x.name)]
        if rest and not images:
            unread.append(name)
            continue
        classes.append(tidy(name))
        labels += [tidy(name)] * len(images)
        paths += map(str, images)
    if unread:
        request.notes.append(
            f"No classes, as they contain no images: {preview(unread)}."
        )
    request.skip(key, "outside the class folders", loose)
    request.skip(key, "without an image's file extension", others)
    return Table(
        labels,
        files=[request.relative(path) for path in paths],
        kinds={NAMES: request.relative(folder)},
        classes=classes,
        paths=paths,
    )


def _may_be_image(name: str) -> bool:
    """Whether a file without an image's ending may be one: it is known to be nothing else."""
    kind = mimetypes.guess_type(name)[0] or "image/unknown"
    return name.lower() not in LEFTOVERS and kind.startswith("image/")


def _tables_of_splits(request: Request, paths: list[Path]) -> dict[str, list[Path]]:
    """Group tables by split: called after it, apart from the number of a shard, or in a folder called so."""
    by_name = defaultdict(list)
    by_folder = defaultdict(list)
    for path in paths:
        name = re.sub(r"[-_.]\d.*", "", path.stem)
        by_name[name].append(path)
        if path.parent != request.root:
            by_folder[path.parent.name].append(path)
    for group in (by_name, by_folder):
        matched = match_splits(group, request.splits)
        if "train" not in matched:
            continue
        tables = {key: sorted(group[name]) for key, name in matched.items()}
        for files in tables.values():
            several = files[1:] and not is_parquet(files[0])
            if several or len({file.parent for file in files}) > 1:
                found = [request.relative(file) for file in files]
                raise ValueError(
                    f"Which of these tables is the split: {preview(found)}?"
                )
        return tables
    return {}


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and files in a folder, sorted, without hidden ones and what macOS leaves."""
    with os.scandir(folder) as entries:
        shown = [(x.name, x.is_dir()) for x in entries if is_shown(x.name)]
    shown.sort(key=lambda entry: unicodedata.normalize("NFC", entry[0]))
    for name, _ in shown:
        is_utf8 = name == name.encode(errors="replace").decode()
        if not is_utf8 or not name.strip():
            fault = "of white space only" if is_utf8 else "that is not UTF-8"
            raise ValueError(f"{str(folder / name)!r} has a name {fault}; rename it.")
    folders = [name for name, is_folder in shown if is_folder]
    return folders, [name for name, is_folder in shown if not is_folder]


def _below(folder: Path) -> Iterator[str]:
    """Yield the images in a folder and in all folders below it."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(filter(is_shown, folders))
        images = sorted(filter(is_image_name, files))
        yield from (os.path.join(parent, name) for name in images)
