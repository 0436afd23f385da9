# SPDX-License-Identifier: Apache-2.0
"""Docstrings as PEFT writes them: [`SageLoss`] becomes a link, and `Example:` a section with code."""

import re
from pathlib import Path
from typing import Any

import griffe


PUBLIC = re.findall(
    r'^    "(\w+)",$',
    Path("peft_sage/__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
NAME = re.compile(rf"\[`(({'|'.join(PUBLIC)})(\.\w+)?)`\]")


class CrossReferences(griffe.Extension):
    """Changes the docstrings before they are rendered."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Is called for every object of the package."""
        if obj.docstring:
            text = NAME.sub(r"[`\1`][peft_sage.\1]", obj.docstring.value)
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")
