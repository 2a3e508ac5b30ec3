"""A file and a function stay small enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("app", "trainer") for path in (ROOT / top).rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_CLASS_LINES = 300
MAX_LOOP_LINES = 150

LONGER_FUNCTIONS: dict[str, int] = {}
"""`path:function` -> lines it may have. This list may only shrink."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, inner ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(node: ast.stmt) -> int:
    """Return the lines from the first to the last of a definition."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Return path -> parsed file."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in SOURCES
    }


def num_body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines below the signature: the options of a command are a list, not logic."""
    assert function.end_lineno is not None
    return function.end_lineno - function.body[0].lineno + 1


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCES
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_too_long(trees):
    long = {
        f"{path}:{function.name}": num_body_lines(function)
        for path, tree in trees.items()
        for function in functions(tree)
        if num_body_lines(function) > MAX_FUNCTION_LINES
    }
    excess = {name: lines for name, lines in long.items() if lines > LONGER_FUNCTIONS.get(name, 0)}
    assert excess == {}
    assert set(LONGER_FUNCTIONS) <= set(long), "an exception is no longer needed: remove it"


def test_no_class_is_too_long(trees):
    assert {
        f"{path}:{node.name}": num_lines(node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and num_lines(node) > MAX_CLASS_LINES
    } == {}


def test_the_loop_stays_a_table_of_contents():
    lines = (ROOT / "trainer" / "loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LOOP_LINES
