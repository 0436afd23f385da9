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
from pathlib import Path

from ..descriptions import tidy
from ..pictures import is_image_name, is_shown
from .labels import NAMES
from .splits import match_splits
from .table import Request, Table, images_of_files, preview
from .tables import LISTS, has_columns, is_parquet, read_table


#: Texts of the classes, which are no table of images.
DESCRIPTIONS = ["descriptions.json", "descriptions.csv"]
#: In a split's folder, the files and classes of its images, as `imagefolder` of `datasets` has them.
METADATA = ["metadata.csv", "metadata.jsonl"]
#: What Windows leaves in folders.
LEFTOVERS = ["thumbs.db", "desktop.ini"]


def read_folder(request: Request, root: Path) -> list[Table]:
    """Return the images of the splits, as far as there are any, or all images."""
    folders, files = _entries(root)
    tables = [root / name for name in files if is_table(name)]
    for name in folders:
        inner = _entries(root / name)[1]
        tables += [
            root / name / file for file in inner if is_parquet(file) or file in METADATA
        ]
    fitting = [path for path in tables if has_columns(request, path)]
    matched = match_splits(folders, request.splits)
    has_class_folders = "train" in matched and _entries(root / matched["train"])[0]
    splits = _tables_of_splits(
        request, fitting or ([] if has_class_folders else tables)
    )
    if not splits and len(fitting) == 1:
        splits = {"": fitting}
    if splits:
        used = {path for paths in splits.values() for path in paths}
        unread = [request.relative(path) for path in fitting if path not in used]
        request.note_unread(unread)
        parts = [read_table(request, paths, key) for key, paths in splits.items()]
        return [table for part in parts for table in part]
    if has_class_folders:
        unread = [name for name in folders if name not in matched.values()]
        unread += [file for file in files if is_table(file) or is_image_name(file)]
        request.note_unread(unread)
        return [_class_folders(request, root / v, k) for k, v in matched.items()]
    if any(_entries(root / name)[0] for name in matched.values()):
        request.match(folders)  # raises, as there is nothing to train on
    table = _class_folders(request, root, "")
    if not table.labels or set(folders) <= set(matched.values()):
        raise ValueError(
            f"Folder {str(root)!r} contains neither train/CLASS/*.jpg nor CLASS/*.jpg nor a table with the columns "
            f"{request.image_column!r} and {request.label_column!r}, only {(folders + files)[:10]}."
        )
    return [table]


def is_table(name: str) -> bool:
    """Whether a file may be a table of images by its name."""
    is_list = name.lower().endswith(LISTS) and name not in DESCRIPTIONS
    return is_list or is_parquet(name)


def find_descriptions(root: Path) -> Path | None:
    """Return the file with the texts of the classes that a folder has, if it has one."""
    files = [root / name for name in DESCRIPTIONS]
    return next((path for path in files if path.is_file()), None)


def _class_folders(request: Request, folder: Path, key: str) -> Table:
    """Read a folder per class; an empty one is a class, too, but not one with other files only."""
    folders, files = _entries(folder)
    where = f"Folder {str(folder)!r}, with a folder per class,"
    request.find_image_column(["image", "label"], where)
    loose = [request.relative(folder / name) for name in filter(is_image_name, files)]
    if loose and request.strict:
        raise ValueError(
            f"Image {loose[0]!r} is outside the class folders, like {len(loose) - 1} others; `on_bad_image='skip'` "
            "leaves such images out."
        )
    classes: list[str] = []
    labels: list[str] = []
    paths: list[str | None] = []
    others = []
    unread = []
    for name in folders:
        _refuse_deeper(request, folder / name)
        files = _entries(folder / name)[1]
        images = [str(folder / name / file) for file in files if is_image_name(file)]
        rest = [file for file in files if not is_image_name(file)]
        others += [folder / name / file for file in rest if _may_be_image(file)]
        if rest and not images:
            unread.append(name)
            continue
        classes.append(tidy(name))
        labels += [tidy(name)] * len(images)
        paths += images
    if unread:
        request.notes.append(
            f"No classes, as they contain no images: {preview(unread)}."
        )
    request.skip(key, "outside the class folders", loose)
    request.skip(
        key, "without an image's file extension", [*map(request.relative, others)]
    )
    return Table(
        labels,
        kind=NAMES,
        files=[request.relative(str(path)) for path in paths],
        paths=paths,
        images=images_of_files(paths),
        splits=[key] * len(labels),
        groups=[None] * len(labels),
        classes=classes,
        ordered=False,
    )


def _refuse_deeper(request: Request, folder: Path) -> None:
    """Raise ValueError if an image is in a folder of a class folder."""
    for inner in _entries(folder)[0]:
        for parent, folders, files in os.walk(folder / inner):
            folders[:] = filter(is_shown, folders)
            for file in filter(is_image_name, files):
                raise ValueError(
                    f"Image {request.relative(Path(parent, file))!r} lies deeper than {folder.name}/*: its class may "
                    f"be {folder.name!r} or another."
                )


def _may_be_image(name: str) -> bool:
    """Whether a file without an image's ending may be one: it is known to be nothing else."""
    kind = mimetypes.guess_type(name)[0] or "image/unknown"
    return name.lower() not in LEFTOVERS and kind.startswith("image/")


def _tables_of_splits(request: Request, paths: list[Path]) -> dict[str, list[Path]]:
    """Group tables by the splits that they are called after, apart from the numbers of parquet files' parts."""
    named = defaultdict(list)
    for path in paths:
        # The Hub's own conversion to parquet is `train/0000.parquet`.
        is_nameless = path.stem.isdigit() or path.name in METADATA
        of_folder = is_nameless and path.parent != request.root
        name = path.parent.name if of_folder else path.stem
        named[re.sub(r"[-_.]\d.*", "", name)].append(path)
    matched = match_splits(named, request.splits)
    if "train" not in matched:
        return {}
    tables = {key: sorted(named[name]) for key, name in matched.items()}
    for files in tables.values():
        several = files[1:] and not is_parquet(files[0])
        if several or len({file.parent for file in files}) > 1:
            found = [request.relative(file) for file in files]
            raise ValueError(f"Which of these tables is the split: {preview(found)}?")
    return tables


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
