"""Screens that take only the size that the window has."""

from __future__ import annotations

from textual import events
from textual.command import CommandPalette
from textual.screen import Screen
from textual.widget import Widget


class Fitting:
    """Base of all screens; stands before Textual's base.

    A screen that is laid out for a new size tells itself so in another message. With two sizes
    under way, one of a window that has changed again since, each layout undoes the one before and
    sends its own message: for ever, and whoever waits for the screen to end waits with it. That was
    seen when the app was left just after its window had changed.
    """

    async def _on_resize(self, event: events.Resize) -> None:
        assert isinstance(self, Widget)
        if event.size != self.app.size:  # one with the present size is under way, or was handled
            event.stop()
            event.prevent_default()


class Base(Fitting, Screen[None]):
    """What is under all other screens."""


class Palette(Fitting, CommandPalette):
    """The command palette."""
