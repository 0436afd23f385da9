# SPDX-License-Identifier: Apache-2.0
"""The floors of the package: nothing imports upwards or in a circle, and no function is long."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "peft_sage"
FLOORS = [
    {"_peft_compat"},
    {
        "registration",
        "validation",
        "descriptions",
        "templates",
        "pictures",
        "towers",
        "optimization",
    },
    {"config", "loss", "text_prior", "metrics", "collator", "data"},
    {"weights", "encoding"},
    {"guidance"},
    {"layer"},
    {"model", "classifier"},
    {"attention", "callbacks", "__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, also inside functions and under `TYPE_CHECKING`."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= (
                {node.module.split(".")[0]}
                if node.module
                else {alias.name for alias in node.names}
            )
        assert not isinstance(node, ast.ImportFrom) or not (
            node.module or ""
        ).startswith("peft_sage"), path
    return rooms


def test_every_file_has_a_room():
    assert {room(path) for path in FILES} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upwards(path):
    upwards = {
        other for other in imported(path) if FLOOR_OF[other] > FLOOR_OF[room(path)]
    }
    assert not upwards, f"{room(path)} imports {upwards} from a higher floor"


def test_there_is_no_circle():
    rooms = {name: set() for name in FLOOR_OF}
    for path in FILES:
        rooms[room(path)] |= imported(path) - {room(path)}
    while free := {name for name, needed in rooms.items() if not needed & rooms.keys()}:
        rooms = {name: needed for name, needed in rooms.items() if name not in free}
    assert not rooms, f"in a circle: {sorted(rooms)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_longer_than_60_lines(path):
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in long.items() if length > 60} == {}
