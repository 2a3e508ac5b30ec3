"""The contact sheet: rows of frames with words above each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.sampling.video_io import Frame, write_png

CELL = 96
"""Height of a frame on the sheet, in pixels."""
MAX_LINES = 4
_GAP = 6
_LINE = 18
_PAPER, _INK = (250, 250, 248), (30, 30, 30)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Row:
    """One strip of the sheet."""

    title: str
    frames: Sequence[Frame]
    text: str = ""
    """Below the title, on as many lines as it takes, `MAX_LINES` at most."""


def write_sheet(path: Path, rows: Sequence[Row], *, cell: int = CELL) -> None:
    """Write the rows below one another as one PNG.

    Frames keep their aspect and are brought to one height; small ones are enlarged without
    smoothing.

    Args:
        path: the PNG.
        rows: what to show, at least one.
        cell: height of a frame, in pixels.

    Raises:
        DiskError: disk full or read-only.
    """
    font = load_font(13)
    cells = [[_cell(frame, cell) for frame in row.frames] for row in rows]
    width = max(_GAP + sum(picture.width + _GAP for picture in row) for row in cells)
    words = [[row.title, *_short(_lines(row.text, font, width - 2 * _GAP))] for row in rows]
    height = _GAP + sum(len(lines) * _LINE + cell + _GAP for lines in words)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _GAP
    for lines, pictures in zip(words, cells, strict=True):
        for line in lines:
            pen.text((_GAP, top), line, fill=_INK, font=font)
            top += _LINE
        left = _GAP
        for picture in pictures:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
        top += cell + _GAP
    write_png(path, np.asarray(sheet))


def write_frames(folder: Path, name: str, row: Row, num: int = 4) -> list[str]:
    """Write some frames of a row, first and last among them, as PNGs; return their paths."""
    chosen = np.linspace(0, len(row.frames) - 1, min(num, len(row.frames))).round().astype(int)
    paths = [folder / f"{name}_{index:02}.png" for index in chosen]
    for path, index in zip(paths, chosen, strict=True):
        write_png(path, row.frames[index])
    return [str(path) for path in paths]


def load_font(size: int) -> Font:
    """Return the font that Pillow brings along, of this many pixels."""
    return ImageFont.load_default(size=size)


def wrapped(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Break a text between words into lines of this many pixels; an ellipsis stands for the rest.

    A word that is wider is broken itself; a line break in the text stays one.
    """
    lines: list[str] = []
    for line in (line for part in text.splitlines() for line in _lines(part, font, width)):
        rest = line
        while rest and font.getlength(rest) > width:
            num = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
            lines.append(rest[:num])
            rest = rest[num:]
        if rest:
            lines.append(rest)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last}…"]


def _cell(frame: Frame, height: int) -> Image.Image:
    picture = Image.fromarray(frame)
    width = max(round(picture.width * height / picture.height), 1)
    way = Image.Resampling.NEAREST if height >= picture.height else Image.Resampling.BOX
    return picture.resize((width, height), way)


def _short(lines: Iterator[str]) -> list[str]:
    found = list(lines)
    if len(found) > MAX_LINES:
        found[MAX_LINES - 1 :] = [f"{found[MAX_LINES - 1]} …"]
    return found


def _lines(text: str, font: Font, width: int) -> Iterator[str]:
    """Break a text between words into lines of this many pixels; a longer word has its own."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            yield line
            line = word
        else:
            line = longer
    if line:
        yield line
