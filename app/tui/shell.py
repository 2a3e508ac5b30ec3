"""What the app is apart from its screens: keys, themes, errors, room, and leaving."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from textual import actions, events, on, work
from textual.actions import ActionParseResult
from textual.app import App, SystemCommand
from textual.command import CommandPalette
from textual.dom import DOMNode
from textual.screen import Screen

from app.domain.app_memory import remember_theme
from app.tui.fitting import Base, Palette
from app.tui.preferences import Preferences
from app.tui.read_only import is_refused
from app.tui.room import TooSmall, is_too_small
from app.tui.theme import TERMINAL
from app.tui.threads import Readers
from trainer.contract.errors import MenmaError


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end the app, so that the terminal is left in order."""
    names = ("SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


class Shell(App[None]):
    """The app without its screens.

    Args:
        preferences: keys and themes.
        read_only: to look only: what would change something is refused, with words.
    """

    def __init__(self, preferences: Preferences | None = None, *, read_only: bool = False) -> None:
        super().__init__()
        self.preferences = preferences or Preferences()
        self.read_only = read_only
        self.crash: BaseException | None = None
        """The mistake of our own that ended the app."""
        self.ended_by: int | None = None
        """The signal that ended the app."""
        self._has_begun = False
        self.owns_process = False
        """It is alone in its process: signals end it as `q` does, threads end with it."""
        for theme in self.preferences.themes:
            self.register_theme(theme)

    def get_default_screen(self) -> Screen[None]:
        """Return what is under all other screens."""
        return Base(id="_default")

    def action_command_palette(self) -> None:
        """Show the command palette."""
        if self.use_command_palette and not isinstance(self.screen, CommandPalette):
            self.push_screen(Palette(id="--command-palette"))

    def begin(self) -> None:
        """Take the user's keys, say what is wrong with them, look at the room."""
        if self.preferences.keys:
            self.set_keymap(self.preferences.keys)
        problems = self.preferences.problems
        if problems:
            more = f"\n{len(problems) - 1} more: `menma keys` lists them." if problems[1:] else ""
            words = f"{self.preferences.file}:\n{problems[0]}{more}"
            self.notify(words, severity="warning", timeout=20, markup=False)
        self._has_begun = True
        self.look_at_room()
        self.set_interval(1.0, self.look_at_room)  # a resize while it starts may get lost
        if self.owns_process:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(Readers())
            for number in ending_signals():
                with suppress(NotImplementedError):  # Windows
                    loop.add_signal_handler(number, self._end_by, number)

    @on(events.Resize)
    @on(TooSmall.Uncovered)
    def room_may_have_changed(self) -> None:
        """Look once everybody knows the new size."""
        self.call_later(self.look_at_room)

    def look_at_room(self) -> None:
        """Cover the screen with words where there is too little room, and uncover it again.

        A screen that missed a change of the window learns of it here.
        """
        if not self._has_begun or not self.screen_stack:  # the last one goes before the timers
            return
        covered = any(isinstance(screen, TooSmall) for screen in self.screen_stack)
        if is_too_small(self.size) and not covered:
            self.push_screen(TooSmall())
        elif not is_too_small(self.size) and isinstance(self.screen, TooSmall):
            self.pop_screen()
        elif self.screen.size != self.size:  # it was not told, and would stay torn
            self.screen.post_message(events.Resize(self.size, self.size))

    async def run_action(
        self,
        action: str | ActionParseResult,
        default_namespace: DOMNode | None = None,
        namespaces: Mapping[str, DOMNode] | None = None,
    ) -> bool:
        """Do what a key is for; a failure that people can mend is told and ends nothing."""
        if self.read_only and self._refuses(action, default_namespace or self, namespaces or {}):
            self.notify("It was opened to look only: nothing is changed.", severity="warning")
            return True
        try:
            return await super().run_action(action, default_namespace, namespaces)
        except (MenmaError, OSError) as error:
            self.notify(str(error), severity="error", timeout=10, markup=False)
            return True

    def copy_to_clipboard(self, text: str) -> None:
        """Copy text; in tmux also by its own command, as it drops what the terminal is sent."""
        super().copy_to_clipboard(text)
        if os.environ.get("TMUX"):
            self._copy_by_tmux(text)

    @work(thread=True)
    def _copy_by_tmux(self, text: str) -> None:
        command = ["tmux", "load-buffer", "-w", "-"]
        with suppress(OSError, subprocess.SubprocessError):  # the usual way has been tried, too
            subprocess.run(
                command, input=text.encode(), capture_output=True, check=False, timeout=10
            )

    def action_next_theme(self) -> None:
        """Take the next theme, and remember it for the next time."""
        names = [theme.name for theme in self.preferences.themes] + [TERMINAL]
        place = names.index(self.theme) if self.theme in names else -1
        self.theme = names[(place + 1) % len(names)]
        if self.preferences.remembers and not self.read_only:
            remember_theme(self.theme)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Return the palette's commands; to look only: without the one that writes a picture."""
        for command in super().get_system_commands(screen):
            if not (self.read_only and command.title == "Screenshot"):
                yield command

    def _refuses(
        self,
        action: str | ActionParseResult,
        default: DOMNode,
        namespaces: Mapping[str, DOMNode],
    ) -> bool:
        parsed = actions.parse(action) if isinstance(action, str) else action
        place, name, _ = parsed
        places = {"": default, "app": self, "screen": self.screen, **namespaces}
        if self.focused is not None:
            places["focused"] = self.focused
        return place in places and is_refused(places[place], name)

    def _end_by(self, number: int) -> None:
        self.ended_by = number
        self.exit()

    def _handle_exception(self, error: Exception) -> None:
        # Textual's only place for it; it prints all local variables, which may hold secrets.
        self.crash = self.crash or error
        super()._handle_exception(error)
