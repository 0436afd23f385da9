# SPDX-License-Identifier: Apache-2.0
"""Docstrings as PEFT writes them: [`SageLoss`] becomes a link, and `Example:` a section with code."""

import re
from pathlib import Path
from typing import Any

import griffe


MODULES = {
    name: module
    for module in ("peft_sage.report", "peft_sage.data", "peft_sage")
    for name in re.findall(
        r'"(\w+)"[,\]]',
        Path(*module.split("."), "__init__.py").read_text(encoding="utf-8"),
    )
}
NAME = re.compile(rf"\[`(({'|'.join(MODULES)})(\.\w+)?)`\]")


class CrossReferences(griffe.Extension):
    """Changes the docstrings before they are rendered."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Is called for every object of the package."""
        if obj.docstring:
            text = NAME.sub(
                lambda match: f"[`{match[1]}`][{MODULES[match[2]]}.{match[1]}]",
                obj.docstring.value,
            )
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")
