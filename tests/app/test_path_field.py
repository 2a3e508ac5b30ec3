"""A path is completed as in a shell, or chosen from a tree."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.app import App, ComposeResult
from textual.widgets import Button

from app.tui.path_field import PathField, PathTree, completed, completions


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("clips/cats", "clips/dogs", "models", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("models/wan_a.safetensors", "models/wan_b.safetensors", "models/note.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_completions_are_what_a_shell_offers(place):
    assert completions("cl", folders=True) == ["clips/"]
    assert completions("clips/", folders=True) == ["clips/cats/", "clips/dogs/"]
    assert completions("models/", folders=True) == []
    ending = (".safetensors",)
    wan = ["models/wan_a.safetensors", "models/wan_b.safetensors"]
    assert completions("models/", folders=False, suffixes=ending) == wan
    assert completions("~/mo", folders=False) == ["~/models/"]
    assert completions(f"{place}/mo", folders=False) == [f"{place}/models/"]
    assert ".hidden/" not in completions("", folders=True)
    assert completions(".h", folders=True) == [".hidden/"]
    assert completions("none/", folders=True) == []
    assert completions("a\0b/", folders=True) == []
    assert completed("models/", wan) == "models/wan_"
    assert completed("x", []) == "x"


@given(names=st.lists(st.text(max_size=5), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_what_is_completed_is_the_start_of_all(names):
    start = completed("", names)
    assert all(name.startswith(start) for name in names)
    longer = [name[: len(start) + 1] for name in names]
    assert len(set(longer)) > 1 or start == names[0]


class FieldApp(App[None]):
    def compose(self) -> ComposeResult:
        yield PathField(folders=True)
        yield Button("behind it")


def test_keys_complete_go_through_and_go_on(place):
    async def work() -> None:
        app = FieldApp()
        async with app.run_test() as pilot:
            field = app.query_one(PathField)
            await pilot.press(*"cl", "tab")
            assert field.value == "clips/"
            assert field.path == Path("clips")
            await pilot.press("down")
            assert field.value == "clips/cats/"
            await pilot.press("down")
            assert field.value == "clips/dogs/"
            await pilot.press("up")
            assert field.value == "clips/cats/"
            await pilot.press("tab")
            assert isinstance(app.focused, Button)
            await pilot.press("shift+tab", "tab")
            assert isinstance(app.focused, Button), "nothing was typed: it only passes"

    asyncio.run(work())


def test_a_tree_begins_at_what_was_typed(place):
    async def work() -> None:
        app = FieldApp()
        async with app.run_test() as pilot:
            field = app.query_one(PathField)
            field.show("clips/none")
            await pilot.press("ctrl+o")
            assert isinstance(app.screen, PathTree)
            tree = app.screen.query_one("#path-tree")
            for _ in range(1200):
                if len(tree.root.children) == 2:
                    break
                await pilot.pause(0.05)
            await pilot.press("j", "s")
            assert field.path == place / "clips" / "cats"
            await pilot.press("ctrl+o", "backspace", "s")
            assert field.path == place / "clips"
            await pilot.press("ctrl+o", "escape")
            assert field.path == place / "clips"

    asyncio.run(work())
