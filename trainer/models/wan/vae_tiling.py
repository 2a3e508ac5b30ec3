"""Cutting frames into overlapping tiles and fading one into the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from trainer.contract.errors import ConfigError

OVERLAP_RATIO = 0.25
"""Share of a tile that it has in common with its neighbour, at least."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a frame and the weight of each of its rows and columns in the result."""

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    def weigh(self, values: Tensor) -> Tensor:
        """Multiply (…, rows, columns) by the tile's weights, in their dtype."""
        rows = self.row_weights.to(values.device)
        return values * rows[:, None] * self.column_weights.to(values.device)


def tile_spans(size: int, tile: int) -> list[tuple[int, int]]:
    """Return starts and ends of equally long, evenly spread tiles that cover `size` cells.

    Neighbours share at least `OVERLAP_RATIO` of a tile; one span if it holds everything.
    """
    if tile >= size:
        return [(0, size)]
    advance = max(1, tile - round(tile * OVERLAP_RATIO))
    gaps = -(-(size - tile) // advance)
    starts = [round(i * (size - tile) / gaps) for i in range(gaps + 1)]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: list[tuple[int, int]], size: int, dtype: torch.dtype) -> list[Tensor]:
    """Return one weight per cell of each span; over all spans they sum to 1 at every cell.

    A weight grows linearly with the distance to the span's edge, over the overlap's length.
    Edges of the frame do not fade. A single span has weight exactly 1.
    """
    raw = []
    for i, (start, end) in enumerate(spans):
        cells = torch.arange(start, end, dtype=dtype)
        weight = torch.ones_like(cells)
        if i > 0:
            shared = spans[i - 1][1] - start
            weight = torch.minimum(weight, (cells - start + 0.5) / shared)
        if i < len(spans) - 1:
            shared = end - spans[i + 1][0]
            weight = torch.minimum(weight, (end - cells - 0.5) / shared)
        raw.append(weight)
    total = torch.zeros(size, dtype=dtype)
    for (start, end), weight in zip(spans, raw, strict=True):
        total[start:end] += weight
    return [weight / total[start:end] for (start, end), weight in zip(spans, raw, strict=True)]


def tiles(
    height: int, width: int, tile: tuple[int, int], scale: int, dtype: torch.dtype
) -> Iterator[tuple[Tile, Tile]]:
    """Yield each tile twice: in latent cells and in pixels, row by row.

    Args:
        height, width: of the frame, in latent cells.
        tile: (height, width) of a tile, in latent cells.
        scale: pixels per latent cell along height and width.
        dtype: of the weights.
    """
    spans = tile_spans(height, tile[0]), tile_spans(width, tile[1])
    sizes = height, width
    coarse, fine = (
        [
            [
                (slice(start * step, end * step), weights)
                for (start, end), weights in zip(
                    axis,
                    blend_weights([(a * step, b * step) for a, b in axis], size * step, dtype),
                    strict=True,
                )
            ]
            for axis, size in zip(spans, sizes, strict=True)
        ]
        for step in (1, scale)
    )
    for small, large in zip(product(*coarse), product(*fine), strict=True):
        yield _tile(*small), _tile(*large)


def _tile(row: tuple[slice, Tensor], column: tuple[slice, Tensor]) -> Tile:
    return Tile(row[0], column[0], row[1], column[1])


def tile_in_latents(tile: tuple[int, int], stride: tuple[int, int, int]) -> tuple[int, int]:
    """Convert a tile's (height, width) from pixels to latent cells.

    Raises:
        ConfigError: it is not a positive multiple of the VAE's stride.
    """
    for pixels, step in zip(tile, stride[1:], strict=True):
        if pixels < step or pixels % step:
            raise ConfigError(
                f"a VAE tile of {tile[1]}x{tile[0]} pixels is not a multiple of {step}",
                hint=f"use multiples of {step}, such as {32 * step}",
            )
    return tile[0] // stride[1], tile[1] // stride[2]
