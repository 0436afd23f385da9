# SPDX-License-Identifier: Apache-2.0
"""The families that are tested, for the documentation: `python -m peft_sage.towers` prints them."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """A model family.

    Args:
        model_type: The `model_type` of its configuration.
        blocks: Names of the adapted blocks, with `{}` for each number.
        text: Whether the model embeds text as well, so that class descriptions need no other model.
    """

    model_type: str
    blocks: str
    text: bool = False


FAMILIES: tuple[Family, ...] = ()


def families_table() -> str:
    """Return the families as a Markdown table."""
    rows = [f"| `{f.model_type}` | `{f.blocks.replace('{}', 'N')}` | {'yes' if f.text else ''} |" for f in FAMILIES]
    return "\n".join(["| `model_type` | adapted blocks | text embeddings |", "|---|---|---|", *rows])
