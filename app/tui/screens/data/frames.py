"""Frames of a clip in half blocks, one at a time."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text
from textual import events
from textual.app import RenderResult
from textual.widget import Widget

from app.render.half_blocks import frame_text
from app.runs.frames import ClipFrames


class FrameView(Widget):
    """One of some frames of a clip; `move` goes through them."""

    DEFAULT_CSS = "FrameView { width: 45%; height: 1fr; padding: 0 0 0 1; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  (Textual's own name)
        super().__init__(id=id)
        self._words = ""
        self._frames: ClipFrames | None = None
        self._place = 0
        self._drawn: dict[tuple[Path, int, int], Text] = {}

    def say(self, words: str) -> None:
        """Show words in the place of a frame."""
        self._frames, self._words = None, words
        self.refresh()

    def show(self, frames: ClipFrames) -> None:
        """Show the first of other frames."""
        self._frames, self._place = frames, 0
        self._drawn.clear()
        self.refresh()

    def move(self, by: int) -> None:
        """Show a later or an earlier frame; it stops at both ends."""
        if self._frames is not None:
            self._place = min(max(self._place + by, 0), len(self._frames.paths) - 1)
            self.refresh()

    def on_resize(self, event: events.Resize) -> None:
        """Draw for another size."""
        self._drawn.clear()

    def render(self) -> RenderResult:
        """Draw the frame, with its number below."""
        frames = self._frames
        if frames is None:
            return Text(self._words)
        width, height = self.size.width, self.size.height - 1
        path = frames.paths[self._place]
        key = (path, width, height)
        if key not in self._drawn:
            try:
                self._drawn[key] = frame_text(path, width, height)
            except (OSError, ValueError):  # the cache has made room
                self._drawn[key] = Text("the picture is gone: r looks again")
        number = f"frame {frames.numbers[self._place] + 1} of {frames.num_frames}"
        return self._drawn[key].copy().append(f"\n{number}", style="not bold")
