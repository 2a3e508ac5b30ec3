"""The app: screens, themes, and how it is left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from app.tui import running
from app.tui.preferences import Preferences, first_theme, read_preferences
from app.tui.screens.jobs import JobsScreen
from app.tui.screens.library import LibraryScreen
from app.tui.screens.monitor.screen import MonitorScreen
from app.tui.screens.system import SystemScreen
from app.tui.shell import Shell
from app.tui.sources import Sources
from app.tui.widgets import Ask

if TYPE_CHECKING:
    from app.tui.screens.config.screen import ConfigScreen
    from app.tui.screens.wizard.screen import Finished

RUNS = Path("runs")


class MenmaApp(Shell):
    """The full-screen app."""

    TITLE = "menma"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "show('jobs')", "Jobs", show=False, id="show-jobs"),
        Binding("2", "show('config')", "Config", show=False, id="show-config"),
        Binding("3", "show('monitor')", "Monitor", show=False, id="show-monitor"),
        Binding("4", "show('data')", "Data", show=False, id="show-data"),
        Binding("5", "show('library')", "Library", show=False, id="show-library"),
        Binding("6", "show('system')", "System", show=False, id="show-system"),
        Binding("colon", "command_palette", "Palette", show=False, id="palette"),
        Binding("question_mark", "show_help_panel", "Help", id="help"),
        Binding("T", "next_theme", "Theme", show=False, id="theme"),
        Binding("q", "quit", "Quit", id="quit"),
    ]

    def __init__(
        self,
        sources: Sources,
        config: Path | None = None,
        preferences: Preferences | None = None,
        *,
        fps: float | None = None,
    ) -> None:
        super().__init__(preferences, read_only=sources.read_only)
        self._sources, self._config = sources, config
        self.fps = fps
        """How often a second screens look for news; None: what suits the connection."""
        self.theme = first_theme(self.preferences)

    def on_mount(self) -> None:
        """Show the list first; the other screens are made when they are shown."""
        self.install_screen(JobsScreen(self._sources), "jobs")
        self.install_screen(MonitorScreen(), "monitor")
        self.install_screen(LibraryScreen(self._sources), "library")
        self.install_screen(SystemScreen(), "system")
        self.push_screen("jobs")
        if self._config is not None:
            self.edit_config(self._config)
        self.begin()

    def action_show(self, name: str) -> None:
        """Show a screen by its name."""
        if name == "config" and not self.is_screen_installed(name):
            self.install_screen(_config_screen()(self._sources), name)
        if name == "data" and not self.is_screen_installed(name):
            from app.tui.screens.data.screen import DataScreen

            self.install_screen(DataScreen(self._sources, self._open_config), name)
        if self.screen is not self.get_screen(name):
            self.switch_screen(name)

    def edit_config(self, path: Path) -> None:
        """Show a config."""
        if not self.is_screen_installed("config"):
            self.install_screen(_config_screen()(self._sources), "config")
        self.get_screen("config", _config_screen()).open(path)
        self.switch_screen("config")

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Yield what the command palette offers."""
        if not self.read_only:
            yield SystemCommand("New training", "from a model to a queued run", self.action_new)
        yield from super().get_system_commands(screen)

    def action_new(self) -> None:
        """Ask for everything that a training needs, and start it."""
        from app.tui.screens.wizard.screen import WizardScreen

        if not isinstance(self.screen, WizardScreen):
            self.push_screen(WizardScreen(self._sources), self._made)

    def _made(self, finished: Finished | None) -> None:
        """Show the jobs of a new training, or its config."""
        if finished is None:
            return
        words = finished.words
        if finished.jobs:
            self.action_show("jobs")
        elif self._has_changes():
            words += ". The config screen has another one with changes: save it, then o opens this."
        else:
            self.edit_config(finished.path)
        self.call_after_refresh(self.notify, words, timeout=10)  # on the screen that comes now

    def _open_config(self) -> Path | None:
        """Return the config that the config's screen shows."""
        if not self.is_screen_installed("config"):
            return None
        file = self.get_screen("config", _config_screen()).file
        return None if file is None or file.saved is None else file.path

    async def action_quit(self) -> None:
        """Leave; ask first where a config has changes that are not saved."""

        def answered(agreed: bool | None) -> None:
            if agreed:
                self.exit()

        if not self._has_changes():
            self.exit()
        elif not isinstance(self.screen, Ask):
            question = "The config has changes that are not saved."
            self.push_screen(Ask(question, "Leave without them"), answered)

    def _has_changes(self) -> bool:
        if not self.is_screen_installed("config"):
            return False
        return self.get_screen("config", _config_screen()).has_changes

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


def _config_screen() -> type[ConfigScreen]:
    """Return the class of the config's screen; its modules are loaded when somebody wants it."""
    from app.tui.screens.config.screen import ConfigScreen

    return ConfigScreen


def run_app(
    runs_dir: Path = RUNS,
    config: Path | None = None,
    *,
    read_only: bool = False,
    fps: float | None = None,
) -> str:
    """Run the app until it is left; return what is to be said then.

    Args:
        runs_dir: folder of the runs.
        config: file to edit; None: the list is shown first.
        read_only: to look only.
        fps: how often a second screens look for news; None: what suits the connection.

    Raises:
        RunError: it has crashed.
        SystemExit: a signal has ended it.
    """
    sources = Sources(runs_dir, read_only=read_only)
    running.run(MenmaApp(sources, config, read_preferences(), fps=fps))
    num_live = sources.overview().num_live
    if num_live:
        goes = "goes" if num_live == 1 else "go"
        return f"{num_live} {goes} on without this terminal. `menma` shows them again."
    return ""
