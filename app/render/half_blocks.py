"""Frames of videos as half-block characters: two pixels a character, upper and lower.

Drawn by rich, which brings the colours down to what the terminal has (16 million, 256 or 16). Works
in tmux and over SSH, where the terminals' own picture protocols do not. Where nothing can be drawn
(no terminal, no colour, an encoding without the character) the path of the picture is printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.segment import Segment
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console, ConsoleOptions, RenderResult

UPPER_HALF = "▀"
GAP = 1
"""Columns between two frames."""
MIN_COLUMNS = 16
"""Narrower frames would be too coarse to recognise anything: fewer are drawn instead."""

Pixel = tuple[int, int, int]


class PixelArray(Protocol):
    """A uint8 array (H, W, 3) of any library, known by NumPy's array interface."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


Frame = Path | PixelArray
"""A PNG file, or the pixels themselves."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Frames of one video, drawn side by side below their title."""

    title: str
    frames: Sequence[Frame]


def strips_of(event: Mapping[str, Any]) -> tuple[Strip, ...]:
    """Return the strips of an `output` event: `strips=[{"title": str, "frames": [path, …]}, …]`.

    An event of a newer or older version that describes them otherwise has none.
    """
    described = event.get("strips")
    if event.get("type") != "output" or not isinstance(described, list):
        return ()
    return tuple(
        Strip(str(entry.get("title", "")), tuple(Path(frame) for frame in entry["frames"]))
        for entry in described
        if isinstance(entry, dict) and _are_paths(entry.get("frames"))
    )


def can_draw(console: Console) -> bool:
    """Tell whether the console has colours and the character that frames are drawn with."""
    if not console.is_terminal or console.is_dumb_terminal:
        return False
    if console.color_system is None or console.no_color:
        return False
    try:
        UPPER_HALF.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def print_strips(
    console: Console, strips: Sequence[Strip], *, picture: Path | str | None = None
) -> None:
    """Draw strips below one another, as wide as the console allows.

    Args:
        console: where to draw.
        strips: what to draw.
        picture: file that shows the same; its path is printed where nothing can be drawn. Without
            it, the paths of the frames are printed.
    """
    if can_draw(console):
        for strip in strips:
            console.print(DrawnStrip(strip))
        return
    if picture is not None:
        _say(console, str(picture))
        return
    for strip in strips:
        _say(console, "\n  ".join([strip.title, *_paths(strip)]))


def frame_text(frame: Frame, columns: int, rows: int) -> Text:
    """Return a frame as characters for a widget: as large as it fits, never enlarged.

    Args:
        frame: what to draw.
        columns: of the box, one pixel each.
        rows: of the box, two pixels each.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is no picture.
    """
    text = Text(no_wrap=True, end="")
    for segment in _draw([_fitted(_open(frame), max(columns, 1), max(2 * rows, 1))]):
        text.append(segment.text, segment.style)
    text.right_crop(1)  # the last line's end
    return text


@dataclass(frozen=True, slots=True)
class DrawnStrip:
    """A strip as something that rich draws: a line of words, then the frames."""

    strip: Strip

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(_one_line(self.strip.title), no_wrap=True, overflow="ellipsis", end="\n")
        try:
            frames = [_open(frame) for frame in self.strip.frames]
        except (OSError, ValueError, TypeError) as error:
            words = "\n  ".join(["cannot be shown:", str(error), *_paths(self.strip)])
            yield Text(words)
            return
        frames = _as_many_as_fit(frames, options.max_width)
        if not frames:
            return
        columns = (options.max_width + GAP) // len(frames) - GAP
        # A row that is taller than the screen cannot be seen at once.
        rows = max(console.height - 3, 2)
        yield from _draw([_fitted(frame, columns, 2 * rows) for frame in frames])


def frame_lines(frame: Frame, columns: int, rows: int) -> list[list[Segment]]:
    """Draw a frame as lines of segments, at most `columns` x `rows` characters, aspect kept.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no picture, or too large to be one.
    """
    drawn = _fitted(_open(frame), max(columns, 1), 2 * max(rows, 1))
    lines: list[list[Segment]] = [[]]
    for segment in _draw([drawn]):
        if segment.text == "\n":
            lines.append([])
        else:
            lines[-1].append(segment)
    return lines[:-1]


def _draw(frames: Sequence[Image]) -> Iterator[Segment]:
    pixels = [_pixels(frame) for frame in frames]
    gap = Segment(" " * GAP)
    for top in range(0, max(frame.height for frame in frames), 2):
        for index, (frame, rows) in enumerate(zip(frames, pixels, strict=True)):
            if index:
                yield gap
            if top >= frame.height:
                yield Segment(" " * frame.width)
                continue
            below = rows[top + 1] if top + 1 < frame.height else [None] * frame.width
            for style, run in groupby(map(_style, rows[top], below)):
                yield Segment(UPPER_HALF * len(list(run)), style)
        yield Segment.line()


def _style(upper: Pixel, lower: Pixel | None) -> Style:
    from rich.color import Color

    below = None if lower is None else Color.from_rgb(*lower)
    return Style(color=Color.from_rgb(*upper), bgcolor=below)


def _fitted(frame: Image, max_columns: int, max_pixels: int) -> Image:
    """Return the frame scaled down to a box, aspect kept; never enlarged."""
    from PIL.Image import Resampling

    scale = min(max_columns / frame.width, max_pixels / frame.height, 1.0)
    size = (max(round(frame.width * scale), 1), max(round(frame.height * scale), 1))
    return frame if size == frame.size else frame.resize(size, Resampling.BOX)


def _as_many_as_fit(frames: Sequence[Image], columns: int) -> list[Image]:
    """Return frames evenly spread over the strip, first and last among them."""
    room = max((columns + GAP) // (MIN_COLUMNS + GAP), 1)
    if len(frames) <= room:
        return list(frames)
    if room == 1:
        return [frames[0]]
    last = len(frames) - 1
    return [frames[round(index * last / (room - 1))] for index in range(room)]


def _open(frame: Frame) -> Image:
    from PIL import Image

    if not isinstance(frame, Path):
        return Image.fromarray(frame).convert("RGB")
    try:
        with Image.open(frame) as image:
            return image.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError) as error:  # SyntaxError: a damaged PNG
        raise ValueError(f"{frame}: {error}") from error


def _pixels(frame: Image) -> list[list[Pixel]]:
    content = frame.tobytes()
    colours: list[Pixel] = list(zip(content[0::3], content[1::3], content[2::3], strict=True))
    return [colours[start : start + frame.width] for start in range(0, len(colours), frame.width)]


def _paths(strip: Strip) -> list[str]:
    return [str(frame) for frame in strip.frames if isinstance(frame, Path)]


def _are_paths(frames: Any) -> bool:
    return (
        isinstance(frames, list) and bool(frames) and all(isinstance(path, str) for path in frames)
    )


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _say(console: Console, text: str) -> None:
    # As output.py does: a terminal of another encoding shows "?" instead of ending the command.
    shown = text.encode(console.encoding, "replace").decode(console.encoding)
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
