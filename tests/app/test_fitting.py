"""A window that changes again before it was drawn: nothing waits for ever."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Iterator

import pytest
from app_runs import ENVIRONMENT, wait_for
from terminals import Terminal
from test_tui import drive, finished_run, folders, true
from textual import events
from textual.command import CommandPalette
from textual.geometry import Size
from textual.screen import Screen

import app.tui
from app.tui.fitting import Fitting
from app.tui.screens.wizard.screen import WizardScreen

__all__ = ["folders"]
PATIENCE_S = 180.0


def every_kind(base: type) -> Iterator[type]:
    """Yield all classes that were derived from a class."""
    for kind in base.__subclasses__():
        yield kind
        yield from every_kind(kind)


def test_every_screen_takes_only_the_size_that_the_window_has():
    for module in pkgutil.walk_packages(app.tui.__path__, "app.tui."):
        importlib.import_module(module.name)
    ours = [kind for kind in every_kind(Screen) if kind.__module__.startswith("app.")]
    assert len(ours) > 15
    assert [kind for kind in ours if not issubclass(kind, Fitting)] == []


@pytest.mark.parametrize("shown", ["jobs", "palette", "question"])
def test_a_size_that_the_window_no_longer_has_is_not_taken(folders, shown, monkeypatch):
    taken: list[Size] = []
    resized = Screen._screen_resized
    monkeypatch.setattr(
        Screen, "_screen_resized", lambda self, size: (taken.append(size), resized(self, size))
    )

    async def steps(pilot, app):
        if shown == "palette":
            await pilot.press("colon")
            await true(pilot, lambda: isinstance(app.screen, CommandPalette))
        if shown == "question":
            await pilot.press("n")
            await true(pilot, lambda: isinstance(app.screen, WizardScreen))
        old = Size(60, 20)
        for screen in app.screen_stack:
            screen.post_message(events.Resize(old, old))
            await pilot.pause()
        assert old not in taken
        await pilot.resize_terminal(100, 30)
        await true(pilot, lambda: app.screen.size == Size(100, 30))
        assert old not in taken
        assert Size(100, 30) in taken

    finished_run(folders.runs_dir)
    drive(folders, steps)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")
@pytest.mark.parametrize("pause_ms", [20, 60, 100, 140, 180, 220])
def test_the_app_can_be_left_while_the_window_changes(tmp_path, pause_ms):
    finished_run(tmp_path / "runs")
    own = {"TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path / "state"),
           "XDG_CONFIG_HOME": str(tmp_path / "config")}  # fmt: skip
    terminal = Terminal(
        [sys.executable, "-m", "app"], cwd=tmp_path, environment=ENVIRONMENT | own, size=(40, 10)
    )
    try:
        wait_for(lambda: "is too small" in terminal.output, PATIENCE_S)
        terminal.set_size((80, 24))
        terminal.process.send_signal(signal.SIGWINCH)
        time.sleep(pause_ms / 1000)
        terminal.send("q")
        assert terminal.process.wait(PATIENCE_S) == 0
    finally:
        terminal.end()
