"""Resize to cover and crop the centre: an area average shrinks, Lanczos enlarges."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def resize_cover(
    image_HW3: Pixels, width: int, height: int, *, pixel_aspect: float = 1.0
) -> Pixels:
    """Return the centre of `image` that has the shape of `width` x `height`, at that size.

    The crop has fractional borders, so the picture is never stretched, not even by a pixel.

    Args:
        image_HW3: RGB.
        width: of the result.
        height: of the result.
        pixel_aspect: width of a source pixel over its height; not 1 in anamorphic video.
    """
    source_height, source_width = image_HW3.shape[:2]
    if (source_width, source_height) == (width, height) and pixel_aspect == 1:
        return image_HW3
    scale = min(source_width * pixel_aspect / width, source_height / height)
    crop_width, crop_height = scale * width / pixel_aspect, scale * height
    left, top = (source_width - crop_width) / 2, (source_height - crop_height) / 2
    if crop_width * crop_height < width * height:
        box = (left, top, left + crop_width, top + crop_height)
        lanczos = Image.Resampling.LANCZOS
        return np.asarray(Image.fromarray(image_HW3).resize((width, height), lanczos, box=box))
    rows = _average(image_HW3, *_area_taps(source_height, top, crop_height, height))
    columns = _area_taps(source_width, left, crop_width, width)
    average_HW3 = _average(rows.swapaxes(0, 1), *columns).swapaxes(0, 1)
    return np.ascontiguousarray((average_HW3 + 0.5).astype(np.uint8))


@lru_cache(maxsize=256)
def _area_taps(
    source: int, start: float, span: float, target: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return source positions and weights, both (taps, target), of an area average on one axis.

    Output pixel i is the mean of the source over [start + i·s, start + (i + 1)·s), s = span/target;
    source pixels that lie partly in it count by their part.
    """
    edges = np.clip(start + np.arange(target + 1) * (span / target), 0, source)
    low, high = edges[:-1], edges[1:]
    first = np.minimum(low.astype(np.intp), source - 1)
    num_taps = int((np.ceil(high).astype(np.intp) - first).max())
    positions = first[None] + np.arange(num_taps)[:, None]
    overlap = np.minimum(high, positions + 1) - np.maximum(low, positions)
    weights = np.maximum(overlap, 0)
    weights /= weights.sum(axis=0)
    return np.minimum(positions, source - 1), weights.astype(np.float32)


def _average(
    image: NDArray[np.uint8] | NDArray[np.float32],
    positions: NDArray[np.intp],
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Combine rows of `image` (rows, …) by weight: (taps, target) -> (target, …)."""
    total = np.zeros((positions.shape[1], *image.shape[1:]), np.float32)
    for position, weight in zip(positions, weights, strict=True):
        total += image[position] * weight[:, None, None]
    return total
