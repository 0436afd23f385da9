# SPDX-License-Identifier: Apache-2.0
"""Class descriptions as texts: the shapes and files people keep them in, and the templates for bare names."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast


#: Used for classes that have only a name.
DEFAULT_TEMPLATES = ["a photo of a {}."]

Descriptions = (
    Sequence[str] | Sequence[Sequence[str]] | Mapping[str, str | Sequence[str]]
)


def read_class_descriptions(
    source: Descriptions | str | os.PathLike[str] | Any,
    class_names: Sequence[str] | None = None,
) -> list[str] | dict[str, list[str]]:
    """Read class descriptions in any of the common shapes.

    Args:
        source: A list of class names; a dictionary, or pandas Series, from class name to one or more texts; a `.json`
            file with either; a `.csv` file whose header has the columns `class` and `description`, with as many rows
            per class as it has texts; or a `datasets.ClassLabel`.
        class_names: The classes in the order of their indices. Default: those of the source, in its order.

    Returns:
        Class names, or a dictionary from class name to texts, without white space around them. Others than
        `class_names` are left out with a warning.

    Raises:
        TypeError, ValueError: The source has none of these shapes, or a file cannot be read or names a class twice, a
            text is empty, or a class of `class_names` is missing. The file and the class are named.
    """
    where = "`source`"
    read = cast(Any, source)
    texts: Any
    if isinstance(source, (str, os.PathLike)):
        where = f"`source` {os.fspath(source)!r}"
        read = _read_file(Path(source), where)
    elif hasattr(source, "tolist"):
        # A pandas Series whose index holds the names has their texts.
        index = list(read.keys()) if hasattr(read, "keys") else [0]
        by_name = all(isinstance(name, str) for name in index)
        read = _without_repeats([*read.items()]) if by_name else read.tolist()
    elif isinstance(names := getattr(source, "names", None), list):
        read = names
    try:
        names, texts = normalise_descriptions(read)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    if names is None:
        raise TypeError(
            f"{where} must have class names: a list of str or a dictionary, got a list of lists."
        )
    names = _stripped(names, where)
    has_texts = not isinstance(texts[0], str)
    texts = [[t.strip() for t in entry] for entry in texts] if has_texts else names
    if class_names is not None:
        texts = _in_order(dict(zip(names, texts, strict=True)), class_names, where)
        names = list(class_names)
    return dict(zip(names, texts, strict=True)) if has_texts else names


def warn_of_alike(names: Iterable[str]) -> None:
    """Warn of class names that may be one, as they differ only in case, spaces, `_`, `-` or Unicode form."""
    keys = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        keys[name] = re.sub(r"[\s_-]+", " ", key).strip()
    if alike := equal_keys(keys.items()):
        warnings.warn(
            f"Classes whose names are alike may be one class: {alike}.", stacklevel=3
        )


def equal_keys(pairs: Iterable[tuple[Any, Any]]) -> str:
    """Return the names that share a key, of pairs of both, for a message: the first ten groups of them."""
    groups: dict[Any, list[Any]] = {}
    for name, key in pairs:
        groups.setdefault(key, []).append(name)
    equal = [group for group in groups.values() if len(group) > 1]
    return "; ".join(" and ".join(map(repr, group)) for group in equal[:10])


def tidy(name: str) -> str:
    """Return a class name without the differences that nobody sees: white space, and how accents are encoded."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def normalise_descriptions(
    descriptions: Descriptions,
) -> tuple[list[str] | None, list[str] | list[list[str]]]:
    """Split class descriptions into names (`None` without) and texts (the names again, or lists of texts).

    The order of a dictionary's keys, which is that of the classes, would not survive PEFT's configuration file.

    Raises:
        TypeError, ValueError: It has none of the three shapes; or it, a class or a text is empty.
    """
    if isinstance(descriptions, str) or not isinstance(
        descriptions, (Mapping, Sequence)
    ):
        raise TypeError(
            f"`class_descriptions` must be a list or a dict, got {type(descriptions).__name__}."
        )
    if not descriptions:
        raise ValueError(
            "`class_descriptions` is empty; give one entry per class, or leave it out."
        )
    names: Any = list(descriptions)
    wrong = [name for name in names if not isinstance(name, str)]
    if isinstance(descriptions, Mapping):
        if wrong:
            raise TypeError(
                f"`class_descriptions` must have class names as keys, got {wrong[:10]}."
            )
        return names, [_texts(name, texts) for name, texts in descriptions.items()]
    texts = [_texts(index, entry) for index, entry in enumerate(descriptions)]
    return (None, texts) if wrong else (names, list(names))


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """Return one or more templates as a list; ValueError unless each has exactly one `{}`."""
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or not all(
        isinstance(text, str) and text.count("{}") == 1 for text in templates
    ):
        raise ValueError(
            f"`text_templates` must be texts with exactly one `{{}}` in each, got {templates!r}."
        )
    return templates


def expand(
    descriptions: Descriptions, templates: Sequence[str] | None = None
) -> list[list[str]]:
    """Return the list of texts of each class; bare names are put into the templates, without underscores."""
    _, texts = normalise_descriptions(descriptions)
    templates = check_templates(DEFAULT_TEMPLATES if templates is None else templates)
    # `str.format` would trip over braces in a name.
    return [
        [t.replace("{}", e.replace("_", " ")) for t in templates]
        if isinstance(e, str)
        else e
        for e in texts
    ]


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 if it begins with its mark; ValueError names it."""
    try:
        data = path.read_bytes()
        return data.decode(
            "utf-16"
            if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            else "utf-8-sig"
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as UTF-8: {error}.") from error


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file with a header, each with the number of its last line; ValueError names both."""
    # By the stream and not by `splitlines`: a quoted text may hold line breaks, of which Unicode has ten.
    text = read_text(path)
    delimiter = max(
        ",;\t", key=text.partition("\n")[0].count
    )  # spreadsheets of some countries write semicolons
    rows = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True
    )
    try:
        columns = list(rows.fieldnames or ())
        if len(set(columns)) < len(columns):
            raise ValueError(f"{str(path)!r} names a column twice: {columns}.")
        for row in rows:
            more = len(row.pop(None, []))
            fields = more + sum(value is not None for value in row.values())
            if fields != len(columns):
                raise ValueError(
                    f"{str(path)!r}: line {rows.line_num} has {fields} fields, expected {len(columns)}: {columns}."
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r} cannot be read at line {rows.reader.line_num}: {error}."
        ) from error


def _read_file(path: Path, where: str) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(read_text(path), object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{where} must be a .json or .csv file.")
    texts: dict[str, list[str]] = {}
    for line, row in read_csv(path):
        if not {"class", "description"} <= set(row):
            raise ValueError(
                f"{where} must have the columns 'class' and 'description', got {list(row)}."
            )
        if empty := [
            column for column in ("class", "description") if not row[column].strip()
        ]:
            raise ValueError(
                f"{where} has an empty {empty[0]} in line {line} (class {row['class']!r})."
            )
        texts.setdefault(row["class"].strip(), []).append(row["description"])
    return texts


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(tidy(name) for name, _ in pairs)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"it has more than one entry for {repeated[:10]}.")
    return dict(pairs)


def _in_order(
    texts: dict[str, Any], class_names: Sequence[str], where: str
) -> list[Any]:
    texts = {tidy(name): entry for name, entry in texts.items()}
    if missing := [name for name in class_names if tidy(name) not in texts]:
        raise ValueError(
            f"{where} has no entry for the classes {missing[:10]}; it has {list(texts)[:10]}."
        )
    if more := texts.keys() - set(map(tidy, class_names)):
        warnings.warn(
            f"{where} has {len(more)} classes that are not used: {sorted(more)[:10]}.",
            stacklevel=3,
        )
    return [texts[tidy(name)] for name in class_names]


def _stripped(names: list[str], where: str) -> list[str]:
    """Names without white space around them; ValueError if nothing else made two of them differ."""
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(name.strip(), name)
        if other != name:
            raise ValueError(
                f"{where} has the classes {other!r} and {name!r}, which differ only in white space: make them one."
            )
    return [name.strip() for name in names]


def _texts(name: str | int, texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not all(
        isinstance(text, str) for text in texts
    ):
        raise TypeError(
            f"`class_descriptions` of class {name!r} must be a str or a list of str, got {texts!r}."
        )
    if not texts or not all(map(str.strip, texts)):
        raise ValueError(
            f"`class_descriptions` of class {name!r} must not be empty or have an empty text."
        )
    return list(texts)
