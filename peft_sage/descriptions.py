# SPDX-License-Identifier: Apache-2.0
"""Class descriptions as texts: the shapes and files people keep them in, and the templates for bare names."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


#: Used for classes that have only a name.
DEFAULT_TEMPLATES = ["a photo of a {}."]

Descriptions = Sequence[str] | Sequence[Sequence[str]] | Mapping[str, str | Sequence[str]]


def read_class_descriptions(
    source: Descriptions | str | os.PathLike[str] | Any, class_names: Sequence[str] | None = None
) -> list[str] | dict[str, list[str]]:
    """Read class descriptions in any of the common shapes.

    Args:
        source: A list of class names; a dictionary from class name to one or more texts; a `.json` file with either; a
            `.csv` file whose header has the columns `class` and `description`, with as many rows per class as it has
            texts; or a `datasets.ClassLabel`.
        class_names: The classes in the order of their indices. Default: those of the source, in its order.

    Returns:
        What `class_descriptions` of [`SageConfig`] takes: class names, or a dictionary
        from class name to texts. Classes that are not in `class_names` are left out with a warning.

    Raises:
        ValueError: If a file cannot be read or names a class twice, a text is empty, or a class of `class_names` is
            missing. The file and the class are named.
        TypeError: If the source has none of these shapes.

    Example:
        >>> read_class_descriptions({"owl": "a bird of the night", "cow": ["a cow"]}, class_names=["cow", "owl"])
        {'cow': ['a cow'], 'owl': ['a bird of the night']}
    """
    where = "`source`"
    if isinstance(source, (str, os.PathLike)):
        where = f"`source` {os.fspath(source)!r}"
        source = _read_file(Path(source), where)
    elif isinstance(names := getattr(source, "names", None), list):
        source = names
    try:
        names, texts = normalise_descriptions(source)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    if names is None:
        raise TypeError(f"{where} must have class names: a list of str or a dictionary, got a list of lists.")
    if class_names is not None:
        texts = _in_order(dict(zip(map(_composed, names), texts, strict=True)), class_names, where)
        names = list(class_names)
    if texts and isinstance(texts[0], str):
        return list(names)
    return dict(zip(names, texts, strict=True))


def normalise_descriptions(descriptions: Descriptions) -> tuple[list[str] | None, list[str] | list[list[str]]]:
    """Split class descriptions into names and texts: the order of a dictionary's keys, which is that of the classes,
    does not survive PEFT's configuration file.

    Args:
        descriptions: A list of class names; or one list of written descriptions per class; or a dictionary from class
            name to one or more written descriptions.

    Returns:
        The class names (`None` if there are none), and either the list of names or the lists of descriptions.

    Raises:
        TypeError: If it has none of the three shapes.
        ValueError: If it, a class or a text is empty. The class is named.
    """
    if isinstance(descriptions, str) or not isinstance(descriptions, (Mapping, Sequence)):
        raise TypeError(
            "`class_descriptions` must be a list of str, a list of lists of str, or a dict from class name to str or "
            f"list of str, got {type(descriptions).__name__}."
        )
    if not descriptions:
        raise ValueError("`class_descriptions` is empty; give one entry per class, or leave it out.")
    if isinstance(descriptions, Mapping):
        names = list(descriptions)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"`class_descriptions` must have class names as keys, got {name!r}.")
        return names, [_texts(name, texts) for name, texts in descriptions.items()]
    if all(isinstance(entry, str) for entry in descriptions):
        names = [_texts(index, name)[0] for index, name in enumerate(descriptions)]
        return names, list(names)
    return None, [_texts(index, texts) for index, texts in enumerate(descriptions)]


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """Return one or more templates as a list; ValueError unless each has exactly one `{}`."""
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError("`text_templates` is empty; give at least one template with a `{}`.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"`text_templates` must have exactly one `{{}}` in each template, got {template!r}.")
    return templates


def expand(descriptions: Descriptions, templates: Sequence[str] | None = None) -> list[list[str]]:
    """Return the list of texts of each class; bare names are put into the templates, without underscores.

    Class names that occur twice give a warning, because their rows, and those of a head made from them, are identical.
    """
    names, texts = normalise_descriptions(descriptions)
    templates = check_templates(DEFAULT_TEMPLATES if templates is None else templates)
    repeated = [name for name, count in Counter(names or []).items() if count > 1]
    if repeated:
        warnings.warn(
            f"Class names occur more than once and get identical embeddings: {repeated[:10]}. Write a description "
            "that tells them apart.",
            stacklevel=2,
        )
    # `str.format` would trip over braces in a name.
    return [
        [template.replace("{}", entry.replace("_", " ")) for template in templates]
        if isinstance(entry, str)
        else entry
        for entry in texts
    ]


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 if it begins with their mark; ValueError names it."""
    try:
        data = path.read_bytes()
        marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
        encoding = next((encoding for mark, encoding in marks.items() if data.startswith(mark)), "utf-8-sig")
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 (byte {data[error.start]:#x} at {error.start}): save it as UTF-8."
        ) from error
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file with a header, each with the number of its last line; ValueError names both."""
    # By the stream and not by `splitlines`: a quoted text may hold line breaks, of which Unicode has ten.
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets of some countries write semicolons
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{str(path)!r} names a column twice: {header}.")
        for row in filter(None, rows):
            if len(row) != len(header):
                raise ValueError(
                    f"{str(path)!r} has {len(row)} fields in line {rows.line_num} and {len(header)} columns {header}; "
                    "a text with {delimiter!r} needs quotes."
                )
            yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} cannot be read at line {rows.line_num}: {error}.") from error


def _read_file(path: Path, where: str) -> Any:
    if path.suffix.lower() == ".json":
        text = read_text(path)
        try:
            return json.loads(text, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{where} must be a .json or .csv file.")
    texts: dict[str, list[str]] = {}
    for line, row in read_csv(path):
        if not {"class", "description"} <= set(row):
            raise ValueError(f"{where} must have the columns 'class' and 'description', got {list(row)}.")
        for column in ("class", "description"):
            if not row[column].strip():
                raise ValueError(f"{where} has an empty {column} in line {line} (class {row['class']!r}).")
        texts.setdefault(row["class"], []).append(row["description"])
    return texts


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(_composed(name) for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"it has more than one entry for {repeated[:10]}.")
    return dict(pairs)


def _in_order(texts: dict[str, Any], class_names: Sequence[str], where: str) -> list[Any]:
    missing = [name for name in class_names if _composed(name) not in texts]
    if missing:
        raise ValueError(
            f"{where} has no entry for {len(missing)} of the classes: {missing[:10]}; it has {list(texts)[:10]}."
        )
    more = list(texts.keys() - set(map(_composed, class_names)))
    if more:
        warnings.warn(f"{where} has {len(more)} classes that are not used: {sorted(more)[:10]}.", stacklevel=3)
    return [texts[_composed(name)] for name in class_names]


def _composed(name: str) -> str:
    # A folder's "é" may be two characters where a text file's is one.
    return unicodedata.normalize("NFC", name)


def _texts(name: str | int, texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`class_descriptions` of class {name!r} must be a str or a list of str, got {texts!r}.")
    if not texts:
        raise ValueError(f"`class_descriptions` of class {name!r} is an empty list; give at least one text.")
    for text in texts:
        if not text.strip():
            raise ValueError(f"`class_descriptions` of class {name!r} has an empty text.")
    return list(texts)
