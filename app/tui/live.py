"""Screens that look again and again at what changes by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from textual.screen import Screen

from app.tui.fitting import Fitting
from app.tui.keyed import Keyed

if TYPE_CHECKING:
    from app.tui.app import MenmaApp

INTERVAL_S = 1.0
SLOW_INTERVAL_S = 2.0
LARGE_WINDOW = 120 * 40
"""Characters from which on a window over SSH is drawn less often."""


def interval_s(
    fps: float | None, num_characters: int, environ: Mapping[str, str] = os.environ
) -> float:
    """Return how long a screen waits before it looks again, seconds.

    Args:
        fps: looks a second that somebody asked for; None: what suits the connection.
        num_characters: of the window.
        environ: variables; `SSH_CONNECTION` is there over SSH.
    """
    if fps is not None:
        return 1.0 / fps
    far = bool(environ.get("SSH_CONNECTION"))
    return SLOW_INTERVAL_S if far and num_characters >= LARGE_WINDOW else INTERVAL_S


class LiveScreen(Fitting, Keyed, Screen[None]):
    """A screen that calls `look` when it comes up, and in intervals while it can be seen."""

    def look(self) -> object:
        """Start to read what is shown; a screen's own worker does it."""
        raise NotImplementedError

    def on_screen_resume(self) -> None:
        """Look as soon as it is seen."""
        self.look()

    def on_mount(self) -> None:
        """Begin to look."""
        self._wait()

    def _wait(self) -> None:
        fps = cast("MenmaApp", self.app).fps
        self.set_timer(interval_s(fps, self.size.width * self.size.height), self._look_again)

    def _look_again(self) -> None:
        if self.is_current:
            self.look()
        self._wait()
