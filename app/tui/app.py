"""The app: screens, themes, and how it is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import App
from textual.binding import Binding, BindingType

from app.tui.screens.jobs import JobsScreen
from app.tui.screens.library import LibraryScreen
from app.tui.screens.monitor import MonitorScreen
from app.tui.screens.system import SystemScreen
from app.tui.sources import Sources
from app.tui.theme import DARK, TERMINAL, THEMES

RUNS = Path("runs")
FEW_COLOURS = frozenset({"linux", "screen", "vt100", "ansi", "xterm"})
"""Terminals of 16 colours: the theme of their own colours suits them best."""


class MenmaApp(App[None]):
    """The full-screen app."""

    TITLE = "menma"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "show('jobs')", "Jobs", show=False, id="show-jobs"),
        Binding("3", "show('monitor')", "Monitor", show=False, id="show-monitor"),
        Binding("5", "show('library')", "Library", show=False, id="show-library"),
        Binding("6", "show('system')", "System", show=False, id="show-system"),
        Binding("colon", "command_palette", "Palette", show=False, id="palette"),
        Binding("question_mark", "show_help_panel", "Help", id="help"),
        Binding("T", "next_theme", "Theme", show=False, id="theme"),
        Binding("q", "quit", "Quit", id="quit"),
    ]

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self._sources = sources
        self.num_live = 0
        """Runs and jobs that go on without the app."""
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = TERMINAL if os.environ.get("TERM", "") in FEW_COLOURS else DARK.name

    def on_mount(self) -> None:
        """Show the list first; the other screens are made when they are shown."""
        self.install_screen(JobsScreen(self._sources), "jobs")
        self.install_screen(MonitorScreen(), "monitor")
        self.install_screen(LibraryScreen(self._sources), "library")
        self.install_screen(SystemScreen(), "system")
        self.push_screen("jobs")

    def action_show(self, name: str) -> None:
        """Show a screen by its name."""
        if self.screen is not self.get_screen(name):
            self.switch_screen(name)

    def action_next_theme(self) -> None:
        """Take the next of our themes."""
        names = [theme.name for theme in THEMES] + [TERMINAL]
        place = names.index(self.theme) if self.theme in names else -1
        self.theme = names[(place + 1) % len(names)]

    @on(JobsScreen.Opened)
    async def open_run(self, message: JobsScreen.Opened) -> None:
        """Show a run in the monitor."""
        await self.switch_screen("monitor")
        monitor = self.get_screen("monitor", MonitorScreen)
        monitor.watch_run(message.run)

    @on(MonitorScreen.Left)
    def close_run(self) -> None:
        """Go back to the list."""
        self.switch_screen("jobs")

    @on(JobsScreen.Read)
    def count(self, message: JobsScreen.Read) -> None:
        """Remember how many go on, for the last word."""
        self.num_live = message.overview.num_live


def run_app(runs_dir: Path = RUNS) -> str:
    """Run the app until it is left; return what is to be said then."""
    app = MenmaApp(Sources(runs_dir))
    app.run()
    if app.num_live:
        goes = "goes" if app.num_live == 1 else "go"
        return f"{app.num_live} {goes} on without this terminal. `menma` shows them again."
    return ""
