"""The contact sheet: rows of frames with a line of words above each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.sampling.video_io import Frame, write_png

_CELL = 96
_GAP = 6
_LINE = 18
_PAPER, _INK = (250, 250, 248), (30, 30, 30)


@dataclass(frozen=True, slots=True)
class Row:
    """One strip of the sheet."""

    title: str
    frames: Sequence[Frame]


def write_sheet(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows below one another as one PNG; small frames are enlarged without smoothing."""
    columns = max(len(row.frames) for row in rows)
    width = _GAP + columns * (_CELL + _GAP)
    height = _GAP + len(rows) * (_LINE + _CELL + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    top = _GAP
    for row in rows:
        pen.text((_GAP, top), row.title, fill=_INK, font=font)
        top += _LINE
        for column, frame in enumerate(row.frames):
            cell = Image.fromarray(frame).resize((_CELL, _CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (_GAP + column * (_CELL + _GAP), top))
        top += _CELL + _GAP
    write_png(path, np.asarray(sheet))


def write_frames(folder: Path, name: str, row: Row, num: int = 4) -> list[str]:
    """Write some frames of a row, first and last among them, as PNGs; return their paths."""
    chosen = np.linspace(0, len(row.frames) - 1, min(num, len(row.frames))).round().astype(int)
    paths = [folder / f"{name}_{index:02}.png" for index in chosen]
    for path, index in zip(paths, chosen, strict=True):
        write_png(path, row.frames[index])
    return [str(path) for path in paths]
