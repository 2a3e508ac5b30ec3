"""The app to look only: what would change something is refused with words, on every screen."""

from __future__ import annotations

import asyncio

import pytest
from conftest import CONFIG
from screens import screen_text
from test_tui import finished_run

from app.queue.jobs import JobSpec
from app.queue.store import QueueStore
from app.runs import control
from app.tui.app import MenmaApp
from app.tui.keymap import all_actions
from app.tui.preferences import Preferences
from app.tui.read_only import LOOKS, WRITES, is_refused
from app.tui.screens.jobs import JobsScreen
from app.tui.sources import Sources

WORDS = "It was opened to"
SCREENS = {"1": "jobs", "2": "config", "3": "monitor", "5": "library"}
SIZE = (120, 40)


def test_every_action_is_known_to_look_or_to_write():
    names = {action.id for action in all_actions()}
    assert names - LOOKS - WRITES == set(), "say in tui/read_only.py what these do"
    assert (LOOKS | WRITES) - names == set(), "there are no such actions"
    assert set() == LOOKS & WRITES


def test_what_is_not_known_is_refused_and_what_is_textuals_own_is_not():
    class Other(JobsScreen):
        def action_new(self) -> None: ...

    Other.action_new.__module__ = "app.tui.screens.other"
    screen = Other(Sources.__new__(Sources))
    assert is_refused(screen, "new")
    assert is_refused(screen, "stop")
    assert not is_refused(screen, "log")
    assert not is_refused(screen, "scroll_down")


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """Return sources with a run, a queued job and a config, and all that is in the folder."""
    monkeypatch.chdir(tmp_path)
    run = finished_run(tmp_path / "runs")
    run.output.mkdir()
    (run.output / "fish.safetensors").write_bytes(b"x")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.toml").write_text(CONFIG)
    store = QueueStore(tmp_path / "queue")
    store.add(JobSpec(argv=("cache", "a.toml"), name="a", cwd=tmp_path))
    store.close()
    return Sources(tmp_path / "runs", tmp_path / "queue", read_only=True)


def content(folder):
    return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("queue.db")
    }


def test_all_that_writes_is_refused_with_words_and_nothing_has_changed(scene, tmp_path):
    before = content(tmp_path)
    jobs_before = QueueStore(tmp_path / "queue").jobs()
    writes = {a.id: a for a in all_actions() if a.id in WRITES}

    async def work() -> None:
        app = MenmaApp(scene, preferences=Preferences(remembers=True))
        async with app.run_test(size=SIZE, notifications=True) as pilot:

            async def seen(words: str) -> None:
                for _ in range(1200):
                    if words in screen_text(app):
                        return
                    await pilot.pause(0.05)
                raise AssertionError(f"{words}\n{screen_text(app)}")

            await seen("look only")
            assert scene.store is None
            for key, place in SCREENS.items():
                await pilot.press(key)
                if place == "config":
                    await seen("Open a config")
                    await pilot.press("enter")
                    await seen("model.variant")
                for action in [a for a in writes.values() if a.place == place]:
                    app.clear_notifications()
                    await pilot.pause()
                    assert WORDS not in screen_text(app)
                    await pilot.press(action.keys[0])
                    await seen(WORDS)
            await pilot.press("T", "1")
            await seen("queued")
            commands = [command.title for command in app.get_system_commands(app.screen)]
            assert "Screenshot" not in commands
            assert "Quit" in commands

    asyncio.run(work())
    assert content(tmp_path) == before
    assert QueueStore(tmp_path / "queue").jobs() == jobs_before


def test_no_queue_is_made(tmp_path):
    sources = Sources(tmp_path / "runs", tmp_path / "queue", read_only=True)
    assert sources.overview().entries == ()
    assert not (tmp_path / "queue").exists()


def test_what_the_disk_refuses_is_said_and_ends_nothing(tmp_path, monkeypatch):
    finished_run(tmp_path / "runs")

    async def work() -> None:
        app = MenmaApp(Sources(tmp_path / "runs", tmp_path / "queue"))
        async with app.run_test(size=SIZE, notifications=True) as pilot:

            async def seen(words: str) -> None:
                for _ in range(1200):
                    if words in screen_text(app):
                        return
                    await pilot.pause(0.05)
                raise AssertionError(f"{words}\n{screen_text(app)}")

            await seen("fish")

            def read_only(*arguments: object) -> None:
                raise OSError(30, "Read-only file system")

            monkeypatch.setattr(control, "request_once", read_only)
            monkeypatch.setattr(JobsScreen, "_entry", lambda self: self._living())
            monkeypatch.setattr(JobsScreen, "_living", _living, raising=False)
            await pilot.press("b")
            await seen("Read-only file system")
            assert app.is_running

    asyncio.run(work())


def _living(screen):
    from dataclasses import replace

    return replace(screen._overview.entries[0], live=True)
