"""What a video shows, told from its pixels alone: colour, shape and direction of the moving shape.

Grounds are nearly grey, so the shape is what has colour. Its outline is compared with each shape
drawn at the same place with the same area; its way is that of its centroid. No network is asked.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from trainer.clipart.scenes import (
    COLOURS,
    DIRECTIONS,
    NOVEL_COLOURS,
    NOVEL_GROUND,
    NOVEL_SHAPE,
    SHAPES,
    Frames,
    in_first_colour,
    signed_distance,
)

KNOWN_SHAPES: Final = (*SHAPES, NOVEL_SHAPE)
_CHROMA: Final = 70
"""Largest minus smallest of red, green and blue above which a pixel belongs to the shape."""
_MIN_AREA: Final = 0.015
"""Of the picture, below which nothing is seen."""
_MAX_AREA: Final = 0.4
"""Of the picture, above which it is a ground and no shape."""
_MIN_OVERLAP: Final = 0.7
"""Intersection over union with the best shape, below which it is no shape."""
_GROUND_CONTRAST: Final = 0.5
_MIN_WAY: Final = 0.08
"""Way of the centroid, of the picture's shorter side, below which nothing moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was recognised; None is nothing that counts."""

    colour: str | None
    shape: str | None
    direction: str | None
    overlap: float
    """Mean intersection over union with the best shape."""


def look(video: Frames) -> Seen:
    """Return what a video (F, H, W, 3), uint8, shows."""
    masks = [_mask(frame) for frame in video]
    side = min(video.shape[1:3])
    visible = [index for index, mask in enumerate(masks) if _MIN_AREA <= mask.mean() <= _MAX_AREA]
    if len(visible) < max(2, len(masks) // 2):
        return Seen(colour=None, shape=None, direction=None, overlap=0.0)
    overlaps = np.mean([_overlaps(masks[index]) for index in visible], axis=0)
    best = int(overlaps.argmax())
    centres = np.array([_centre(masks[index]) for index in visible])
    return Seen(
        colour=_colour(video[visible], np.stack([masks[index] for index in visible])),
        shape=KNOWN_SHAPES[best] if overlaps[best] >= _MIN_OVERLAP else None,
        direction=_direction(centres / side),
        overlap=float(overlaps[best]),
    )


def shows_ground(video: Frames, ground: str = NOVEL_GROUND) -> bool:
    """Return whether the ground of a video (F, H, W, 3), uint8, is one of `NOVEL_GROUNDS`.

    The difference of the ground's two colours, without what is grey of it, is a direction in which
    each pixel has a place. Where the first colour belongs and where the second does, the averages
    of these places differ by 1 for the drawn ground, by 0 for a grey one, and by less than a
    quarter for a grey one with a shape of any colour.
    """
    first, second = (np.asarray(colour, dtype=float) for colour in NOVEL_COLOURS[ground])
    axis = first - second
    axis -= axis.mean()
    if ground == NOVEL_GROUND:  # yellow and purple: how much red and green there is, less blue
        axis = np.array([0.5, 0.5, -1.0])
    places = video.astype(float) @ axis / ((first - second) @ axis)
    height, width = video.shape[1:3]
    inside = in_first_colour(
        ground, np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    )
    return bool(places[:, inside].mean() - places[:, ~inside].mean() > _GROUND_CONTRAST)


def _mask(frame: Frames) -> NDArray[np.bool_]:
    chroma = frame.max(axis=-1).astype(int) - frame.min(axis=-1)
    return np.asarray(chroma > _CHROMA)


def _centre(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return x and y in pixels."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean() + 0.5), float(rows.mean() + 0.5)


def _colour(frames: Frames, masks: NDArray[np.bool_]) -> str:
    red, green, blue = frames[masks].mean(axis=0) / 255
    hue = colorsys.rgb_to_hsv(red, green, blue)[0]

    def distance(name: str) -> float:
        own = colorsys.rgb_to_hsv(*(value / 255 for value in COLOURS[name]))[0]
        return min(abs(own - hue), 1 - abs(own - hue))

    return min(COLOURS, key=distance)


def _direction(centres: NDArray[np.float64]) -> str | None:
    quarter = max(1, len(centres) // 4)
    way = centres[-quarter:].mean(axis=0) - centres[:quarter].mean(axis=0)
    axis = int(np.abs(way).argmax())
    if abs(way[axis]) < _MIN_WAY or abs(way[axis]) < 2 * abs(way[1 - axis]):
        return None
    step = tuple(int(np.sign(way[axis])) if index == axis else 0 for index in range(2))
    return next(name for name, unit in DIRECTIONS.items() if unit == step)


def _overlaps(mask: NDArray[np.bool_]) -> list[float]:
    rows_HW, columns_HW = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32) + 0.5
    x, y = _centre(mask)
    result = []
    for shape in KNOWN_SHAPES:
        area, lift = _unit(shape)
        radius = (mask.sum() / area) ** 0.5
        inside = signed_distance(shape, columns_HW - x, rows_HW - y + lift * radius, radius) < 0
        result.append(float((mask & inside).sum() / max((mask | inside).sum(), 1)))
    return result


@cache
def _unit(shape: str) -> tuple[float, float]:
    """Return area, and how far the centroid lies below the middle, of a shape of radius 1."""
    grid = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    inside = signed_distance(shape, *np.meshgrid(grid, grid), 1.0) < 0
    cell = float(np.mean([b - a for a, b in pairwise(grid)])) ** 2
    return float(inside.sum()) * cell, float(grid[np.nonzero(inside)[0]].mean())
