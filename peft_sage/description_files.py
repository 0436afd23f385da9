# SPDX-License-Identifier: Apache-2.0
"""Class descriptions from where people keep them, and a check of what a model makes of them."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from .descriptions import Descriptions, expand, normalise_descriptions
from .encoding import encode_class_descriptions, max_length


def read_class_descriptions(
    source: Descriptions | str | os.PathLike[str] | Any, class_names: Sequence[str] | None = None
) -> list[str] | dict[str, list[str]]:
    """Read class descriptions in any of the common shapes.

    Args:
        source: A list of class names; a dictionary from class name to one or more texts; a `.json` file with either; a
            `.csv` file whose header has the columns `class` and `description`, with as many rows a class as it has
            texts; or a `datasets.ClassLabel`.
        class_names: The classes in the order of their indices, for sources that have names of their own: their entries
            are brought into this order. Default: the order of the source.

    Returns:
        What `class_descriptions` of [`SageConfig`] takes: class names (underscores become spaces), or a dictionary
        from class name to texts.

    Raises:
        ValueError: If a file cannot be read or has another form, or a class of `class_names` is missing.
        TypeError: If the source has none of these shapes.

    Example:
        >>> read_class_descriptions({"owl": "a bird of the night", "cow": ["a cow"]}, class_names=["cow", "owl"])
        {'cow': ['a cow'], 'owl': ['a bird of the night']}
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(Path(source))
    elif isinstance(names := getattr(source, "names", None), list):
        source = names
    names, texts = normalise_descriptions(source)
    if names is None:
        raise TypeError("`source` must have class names: a list of str or a dictionary, got a list of lists.")
    if class_names is not None:
        missing = [name for name in class_names if name not in names]
        if missing:
            raise ValueError(f"`source` has no entry for {len(missing)} of the classes: {missing[:10]}.")
        texts = [texts[names.index(name)] for name in class_names]  # type: ignore[assignment]
        names = list(class_names)
    if _are_names(texts):
        return [name.replace("_", " ") for name in names]
    return dict(zip(names, texts, strict=True))


def check_descriptions(
    model: nn.Module,
    tokenizer: Any,
    descriptions: Descriptions,
    templates: Sequence[str] | None = None,
    threshold: float = 0.98,
) -> list[str]:
    """Warn of class descriptions that a model cannot tell apart or cannot read to the end.

    Args:
        model: A model with a text tower.
        tokenizer: Its tokenizer.
        descriptions: As for [`encode_class_descriptions`].
        templates: For bare class names.
        threshold: Cosine of two classes' embeddings above which they nearly coincide.

    Returns:
        The warnings, which are given as such too: texts that two classes share, texts that are cut at the tower's
        limit, and pairs of classes whose embeddings nearly coincide, the closest first; each by the names of the
        classes. Empty if all is well.

    Raises:
        ValueError: As [`encode_class_descriptions`]; or `threshold` is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be a cosine in (0, 1], got {threshold!r}.")
    with warnings.catch_warnings():
        # What these say, is said by name below.
        warnings.simplefilter("ignore")
        texts_of_class = expand(descriptions, templates)
        embeddings = encode_class_descriptions(model, tokenizer, descriptions, templates)
    names = normalise_descriptions(descriptions)[0] or [f"class {index}" for index in range(len(texts_of_class))]
    problems = _shared_texts(names, texts_of_class)
    if hasattr(tokenizer, "pad"):  # open_clip's tokenizers cut without telling
        problems += _cut_texts(names, texts_of_class, tokenizer, max_length(model, tokenizer))
    cosines = (embeddings @ embeddings.T).triu(diagonal=1)
    first, second = (cosines > threshold).nonzero(as_tuple=True)
    close = sorted(zip(cosines[first, second].tolist(), first.tolist(), second.tolist(), strict=True), reverse=True)
    problems += [
        f"Classes {names[i]!r} and {names[j]!r} have embeddings of cosine {cosine:.3f}: write what tells them apart."
        for cosine, i, j in close
    ]
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return problems


def _read_file(path: Path) -> Descriptions:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"`source` {str(path)!r} cannot be read: {error}") from error
    if path.suffix.lower() != ".csv":
        raise ValueError(f"`source` must be a .json or .csv file, got {str(path)!r}.")
    rows = csv.DictReader(text.splitlines())
    columns = list(rows.fieldnames or [])
    if not {"class", "description"} <= set(columns):
        raise ValueError(f"`source` {str(path)!r} must have the columns 'class' and 'description', got {columns}.")
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row["class"], []).append(row["description"] or "")
    return texts


def _are_names(texts: list[str] | list[list[str]]) -> TypeGuard[list[str]]:
    return isinstance(texts[0], str)


def _shared_texts(names: Sequence[str], texts_of_class: list[list[str]]) -> list[str]:
    classes_of_text: dict[str, list[str]] = {}
    for name, texts in zip(names, texts_of_class, strict=True):
        for text in dict.fromkeys(texts):
            classes_of_text.setdefault(text, []).append(name)
    return [
        f"Classes {classes} share the text {text!r}: write what tells them apart."
        for text, classes in classes_of_text.items()
        if len(classes) > 1
    ]


def _cut_texts(names: Sequence[str], texts_of_class: list[list[str]], tokenizer: Any, limit: int) -> list[str]:
    problems = []
    for name, texts in zip(names, texts_of_class, strict=True):
        lengths = [len(ids) for ids in tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]]
        problems += [
            f"Class {name!r} has a text of {length} tokens, cut at {limit}: {text!r}. Write several shorter ones."
            for text, length in zip(texts, lengths, strict=True)
            if length > limit
        ]
    return problems
