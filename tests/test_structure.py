# SPDX-License-Identifier: Apache-2.0
"""The structure of the code: nothing imports upwards or in a circle, functions and files are short."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ("peft_sage", "examples", "benchmarks")


def test_imports_follow_the_layers(monkeypatch):
    cli = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    assert cli.lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_functions_and_files_are_short():
    for path in (path for name in FOLDERS for path in (ROOT / name).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = len(re.findall(r"^ *[^\s#]", text, re.MULTILINE))
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            docs = len((ast.get_docstring(node) or "").splitlines())
            lines -= docs
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1 - docs
                assert length <= 60, f"{path}: {node.name} has {length} lines"
        assert lines <= 400, f"{path} has {lines} lines of code"
