"""The contact sheet of a matrix: frames in a grid, headings along the top and the left side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trainer.sampling.sheet import Font, load_font, wrapped
from trainer.sampling.video_io import Frame, write_png

MAX_SIDE = 12_000
"""Pixels; frames become smaller to fit."""
LEAST_CELL = 24
_GAP, _PADDING, _LINE = 8, 20, 19
_LEFT = 200
_HEADING_LINES = 3
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 26, 30), (110, 116, 126)
_BAND, _HOLE, _WRONG = (243, 244, 246), (236, 238, 241), (170, 40, 30)


@dataclass(frozen=True, slots=True)
class GridCell:
    """Frames of one sample, side by side; or words, where there is none."""

    frames: Sequence[Frame] = ()
    words: str = ""
    failed: bool = False
    """The words say what went wrong."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What the picture shows."""

    title: str
    note: str
    """Below the title: what holds for all cells."""
    corner: str
    """What the headings are headings of."""
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[GridCell]]]
    """Heading and cells of each row."""
    aspect: tuple[int, int] = field(default=(1, 1))
    """(width, height) of a cell whose sample is missing."""


def write_grid(path: Path, grid: Grid, *, height: int = 168) -> None:
    """Draw the grid as a PNG.

    Args:
        path: the PNG; what was there is replaced.
        grid: what to show, with at least one row and column.
        height: of a frame, in pixels; less where the sheet would have more than `MAX_SIDE`.

    Raises:
        DiskError: disk full or read-only.
    """
    height = _fitting(grid, height)
    widths = [_column_width(grid, index, height) for index in range(len(grid.columns))]
    left = _LEFT if any(heading for heading, _ in grid.rows) else 0
    total = 2 * _PADDING + left + sum(width + _GAP for width in widths)
    fonts = load_font(22), load_font(14)
    heads = [wrapped(text, fonts[1], width, _HEADING_LINES) for text, width in
             zip(grid.columns, widths, strict=True)]  # fmt: skip
    note = wrapped(grid.note, fonts[1], max(total - 2 * _PADDING, 320), 4)
    total = max(total, 320 + 2 * _PADDING)
    band = max(map(len, heads)) * _LINE + 2 * _GAP
    top = _PADDING + 32 + len(note) * _LINE + _GAP
    bottom = top + band + _GAP + len(grid.rows) * (height + _GAP) + _PADDING
    sheet = Image.new("RGB", (total, bottom), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_PADDING, _PADDING - 4), grid.title, fill=_INK, font=fonts[0])
    _lines(pen, (_PADDING, _PADDING + 28), note, fonts[1], _FAINT)
    pen.rectangle((0, top, total, top + band - 1), fill=_BAND)
    corner = wrapped(grid.corner, fonts[1], left - 2 * _GAP, _HEADING_LINES) if left else []
    _lines(pen, (_PADDING, top + _GAP), corner, fonts[1], _FAINT)
    at = _PADDING + left
    for lines, width in zip(heads, widths, strict=True):
        _lines(pen, (at, top + _GAP), lines, fonts[1], _INK)
        at += width + _GAP
    _draw_rows(sheet, grid, (top + band + _GAP, left, height), widths)
    write_png(path, np.asarray(sheet))


def is_drawable(text: str) -> bool:
    """Tell whether the font that Pillow brings along has the characters: it knows Latin alone."""
    return all(ord(character) < 0x250 or character in "–—‘’“”…·" for character in text)


def _draw_rows(
    sheet: Image.Image, grid: Grid, place: tuple[int, int, int], widths: Sequence[int]
) -> None:
    top, left, height = place
    pen, font = ImageDraw.Draw(sheet), load_font(14)
    for heading, cells in grid.rows:
        lines = wrapped(heading, font, left - 2 * _GAP, max(height // _LINE, 1)) if left else []
        _lines(pen, (_PADDING, top), lines, font, _INK)
        at = _PADDING + left
        for cell, width in zip(cells, widths, strict=True):
            if cell.frames:
                for frame in cell.frames:
                    picture = _picture(frame, height)
                    sheet.paste(picture, (at, top))
                    at += picture.width + 2
                at += width + _GAP - sum(_width(frame, height) + 2 for frame in cell.frames)
                continue
            pen.rectangle((at, top, at + width - 1, top + height - 1), fill=_HOLE)
            words = wrapped(cell.words, font, width - 2 * _GAP, max((height - _GAP) // _LINE, 1))
            _lines(pen, (at + _GAP, top + _GAP), words, font, _WRONG if cell.failed else _FAINT)
            at += width + _GAP
        top += height + _GAP


def _lines(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    lines: Sequence[str],
    font: Font,
    colour: tuple[int, int, int],
) -> None:
    for index, line in enumerate(lines):
        pen.text((place[0], place[1] + index * _LINE), line, fill=colour, font=font)


def _fitting(grid: Grid, height: int) -> int:
    """Return the height at which the sheet is not too large, `LEAST_CELL` at least."""
    wide = sum(_column_width(grid, index, height) + _GAP for index in range(len(grid.columns)))
    tall = len(grid.rows) * (height + _GAP)
    share = min(1.0, MAX_SIDE / wide, MAX_SIDE / tall)
    return max(LEAST_CELL, int(height * share))


def _column_width(grid: Grid, index: int, height: int) -> int:
    widths = [
        sum(_width(frame, height) + 2 for frame in cells[index].frames) - 2
        for _, cells in grid.rows
        if cells[index].frames
    ]
    missing = max(1, round(height * grid.aspect[0] / grid.aspect[1]))
    return max(widths, default=missing)


def _width(frame: Frame, height: int) -> int:
    return max(round(int(frame.shape[1]) * height / int(frame.shape[0])), 1)


def _picture(frame: Frame, height: int) -> Image.Image:
    picture = Image.fromarray(frame)
    way = Image.Resampling.NEAREST if height >= picture.height else Image.Resampling.BOX
    return picture.resize((_width(frame, height), height), way)
