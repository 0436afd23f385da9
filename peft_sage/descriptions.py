# SPDX-License-Identifier: Apache-2.0
"""Class descriptions as texts: the shapes a user may give them in, and the templates for bare names."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence


#: Used for classes that have only a name.
DEFAULT_TEMPLATES = ["a photo of a {}."]

Descriptions = Sequence[str] | Sequence[Sequence[str]] | Mapping[str, str | Sequence[str]]


def normalise_descriptions(descriptions: Descriptions) -> tuple[list[str] | None, list[str] | list[list[str]]]:
    """Bring class descriptions into the one form that is stored.

    A dictionary is split into names and texts because the order of its keys, which is the order of the classes, does
    not survive PEFT's configuration file.

    Args:
        descriptions: A list of class names; or one list of written descriptions a class; or a dictionary from class
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
        raise ValueError("`class_descriptions` is empty; give one entry a class, or leave it out.")
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
    """Check templates for class names.

    Args:
        templates: One or more texts with exactly one `{}` each.

    Returns:
        The list of templates.

    Raises:
        ValueError: If there is none, or one that does not have exactly one `{}`.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError("`text_templates` is empty; give at least one template with a `{}`.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"`text_templates` must have exactly one `{{}}` in each template, got {template!r}.")
    return templates


def expand(descriptions: Descriptions, templates: Sequence[str] | None = None) -> list[list[str]]:
    """Return the texts to encode for each class.

    Args:
        descriptions: As in [`normalise_descriptions`]; bare names are put into the templates.
        templates: Texts with one `{}` each. Default: [`DEFAULT_TEMPLATES`].

    Returns:
        One list of texts a class. Repeated class names give a warning that names them, because their rows (and the
        rows of a head made from them) are identical.
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
    if isinstance(texts[0], str):
        # `str.format` would trip over braces in a name.
        return [[template.replace("{}", name) for template in templates] for name in texts]
    return texts


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
