"""What the app is apart from its screens: keys, themes, errors, room, and leaving."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable, Mapping
from typing import Any

from textual import actions, events
from textual.actions import ActionParseResult
from textual.app import App, SystemCommand
from textual.dom import DOMNode
from textual.screen import Screen

from app.domain.app_memory import remember_theme
from app.tui.preferences import Preferences
from app.tui.read_only import is_refused
from app.tui.room import TooSmall, is_too_small
from app.tui.theme import TERMINAL
from trainer.contract.errors import MenmaError

SIGNALS = ("SIGTERM", "SIGHUP")
"""They end the app as `q` does, so that the terminal stays in order."""


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
        for theme in self.preferences.themes:
            self.register_theme(theme)

    def begin(self) -> None:
        """Take the user's keys, say what is wrong with them, look at the room."""
        if self.preferences.keys:
            self.set_keymap(self.preferences.keys)
        problems = self.preferences.problems
        if problems:
            more = f"\n{len(problems) - 1} more: `menma keys` lists them." if problems[1:] else ""
            words = f"{self.preferences.file}:\n{problems[0]}{more}"
            self.notify(words, severity="warning", timeout=20, markup=False)
        self._look_at_room()

    def end_by_signals(self) -> None:
        """From now on, signals end the app as `q` does. Called inside the running loop."""
        loop = asyncio.get_running_loop()
        for name in SIGNALS:
            if hasattr(signal, name):
                loop.add_signal_handler(getattr(signal, name), self._end_by, getattr(signal, name))

    def on_resize(self, event: events.Resize) -> None:
        """Say it when there is no room left."""
        self._look_at_room()

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

    def _look_at_room(self) -> None:
        if is_too_small(self.size) and not isinstance(self.screen, TooSmall):
            self.push_screen(TooSmall())

    def _end_by(self, number: int) -> None:
        self.ended_by = number
        self.exit()

    def _handle_exception(self, error: Exception) -> None:
        # Textual's only place for it; it prints all local variables, which may hold secrets.
        self.crash = self.crash or error
        super()._handle_exception(error)
