"""Captions and videos read a second time, without the code under test."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "green", "blue", "yellow", "purple", "turquoise")
SHAPES = ("circle", "square", "triangle")
WAYS = {
    "left": r"to the left|from right to left|leftwards",
    "right": r"to the right|from left to right|rightwards",
    "up": r"\bup\b|from the bottom to the top|upwards",
    "down": r"\bdown\b|from the top to the bottom|downwards",
}


def words_of(caption: str) -> tuple[list[str], list[str], list[str]]:
    """Return the colours, shapes and directions that a caption names."""
    colours = [name for name in COLOURS if re.search(rf"\b{name}\b", caption)]
    shapes = [name for name in (*SHAPES, "cross") if re.search(rf"\b{name}\b", caption)]
    return colours, shapes, [name for name, way in WAYS.items() if re.search(way, caption)]


def chroma(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return largest minus smallest of red, green and blue, (F, H, W)."""
    wide = frames.astype(np.float64)
    return np.asarray(np.ptp(wide, axis=-1))


def centroids(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return x and y of the chroma's centre of mass in pixels, (F, 2); y points down."""
    weight = chroma(frames)
    total = weight.sum(axis=(1, 2))
    x = (weight.sum(axis=1) * np.arange(weight.shape[2])).sum(axis=1) / total
    y = (weight.sum(axis=2) * np.arange(weight.shape[1])).sum(axis=1) / total
    return np.stack([x, y], axis=1)


def way_of(frames: NDArray[np.uint8]) -> str:
    """Return where a line fitted to the centroids over time points."""
    x, y = np.polyfit(np.arange(len(frames)), centroids(frames), 1)[0]
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"
