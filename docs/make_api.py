# SPDX-License-Identifier: Apache-2.0
"""Writes docs/api.md from the docstrings: `python docs/make_api.py`. A test fails when the page is stale."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import peft_sage


HEADER = """# API

Every name can be imported from `peft_sage`. This page is made from the docstrings by `python docs/make_api.py`.
"""


def make_page() -> str:
    """Return the page."""
    names = [name for name in peft_sage.__all__ if not name.startswith("__")]
    return HEADER + "".join(f"\n{_entry(name, getattr(peft_sage, name))}" for name in names)


def _entry(name: str, item: Any) -> str:
    if isinstance(item, ModuleType):
        sets = [f"- `{key}`: {value}" for key, value in vars(item).items() if key.isupper()]
        return f"## {name}\n\n{_prose(item)}\n" + "\n".join(sets) + "\n"
    text = f"## {name}\n\n```text\n{_signature(name, item)}\n```\n\n{_prose(item)}"
    if inspect.isclass(item):
        for method, function in vars(item).items():
            function = getattr(function, "__func__", getattr(function, "fget", function))
            if method.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            text += f"\n### {name}.{method}\n\n```text\n{_signature(method, function)}\n```\n\n{_prose(function)}"
    return text


def _signature(name: str, item: Any) -> str:
    parts = []
    for parameter in inspect.signature(item).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        # The docstring has the types.
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        parts.append(f"{star}{parameter.name}{default}")
    line = f"{name}({', '.join(parts)})"
    return line if len(line) < 100 else f"{name}(\n    " + ",\n    ".join(parts) + ",\n)"


def _prose(item: Any) -> str:
    """Turn a docstring in Google's style into Markdown."""
    lines = []
    section = ""
    for line in (inspect.getdoc(item) or "").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Example):", line):
            section = line[:-1]
            line = f"**{section}**\n"
        elif section == "Returns":
            line = line.strip()
        elif entry := re.match(r"    (\*{0,2}\w+)( \(.*?\))?: ?(.*)", line):
            line = f"- `{entry[1]}`{entry[2] or ''}: {entry[3]}"
        elif line.startswith("        "):
            # Of an entry, or a formula.
            line = line if "=" in line and "  " in line.strip() else f"  {line.strip()}"
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(make_page(), encoding="utf-8")
