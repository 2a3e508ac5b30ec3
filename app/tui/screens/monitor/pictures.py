"""The frames of samples, drawn in half blocks for a room of so many characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.segment import Segment
from textual.app import RenderResult
from textual.strip import Strip
from textual.widget import Widget

from app.render.half_blocks import frame_lines
from app.runs.ask import Cancelled
from app.runs.frames import clip_frames
from app.runs.samples import Sample
from trainer.contract.errors import MenmaError

NUM_FRAMES = 16
"""Of a video, evenly spread; first and last are among them."""
Lines = list[list[Segment]]


@dataclass(frozen=True, slots=True)
class Film:
    """A sample that can be drawn, or why it cannot."""

    frames: Sequence[Lines] = ()
    numbers: Sequence[int] = ()
    """Which frame of the clip each is, from 0."""
    num_frames: int = 0
    """Of the whole clip."""
    problem: str = ""


def read_film(
    sample: Sample, columns: int, rows: int, is_cancelled: Callable[[], bool]
) -> Film | None:
    """Draw the frames of a sample, in a thread; None: nobody wants them any more.

    Args:
        sample: a video, a folder of pictures, or a picture.
        columns: characters of the room.
        rows: the same.
        is_cancelled: asked while a process takes the frames out of a video.
    """
    path = sample.path
    if not path.exists():
        return Film(problem=f"{path.name} is gone")
    try:
        files: Sequence[Path] = (path,)
        numbers: Sequence[int] = (0,)
        num_frames = 1
        if path.is_dir() or path.suffix.lower() != ".png":
            found = clip_frames(path, num_frames=NUM_FRAMES, cancelled=is_cancelled)
            files, numbers, num_frames = found.paths, found.numbers, found.num_frames
        drawn = [frame_lines(file, columns, rows) for file in files]
    except Cancelled:
        return None
    except (MenmaError, OSError, ValueError) as error:
        return Film(problem=f"{path.name} cannot be shown: {error}")
    return Film(drawn, numbers, num_frames)


class Picture(Widget):
    """One frame, or words in its place."""

    DEFAULT_CSS = "Picture { width: 1fr; height: 1fr; }"

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  (Textual's own name)
        super().__init__(id=id)
        self._lines: Lines = []
        self._words = ""

    def show(self, lines: Lines) -> None:
        """Show a frame."""
        self._lines, self._words = lines, ""
        self.refresh()

    def tell(self, words: str) -> None:
        """Show words."""
        self._lines, self._words = [], words
        self.refresh()

    def render(self) -> RenderResult:
        """Return the words; frames are drawn line by line."""
        return self._words

    def render_line(self, y: int) -> Strip:
        """Return a line of the frame."""
        if not self._lines:
            return super().render_line(y)
        base, width = self.rich_style, self.size.width
        if y >= len(self._lines):
            return Strip.blank(width, base)
        return Strip(self._lines[y]).adjust_cell_length(width, base)
