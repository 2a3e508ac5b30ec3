"""Operations of the Wan VAEs, layer by layer, for whole videos or tiles.

A convolution of I to O channels with k taps takes 2·k·I·O operations for each output pixel. Both
VAEs see one frame first and then four at a time (`models.wan.vae`); with that lone frame a causal
convolution uses the last of its taps in time only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from trainer.contract.memory_model.clips import Clip
from trainer.contract.variants import Variant

Direction = Literal["encode", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """Sizes of a VAE, as in `models.wan.vae_config`; tests keep the two equal."""

    grouped: bool
    """The layout of 2.2, whose upsamplers keep their channels."""
    encoder_dim: int
    decoder_dim: int
    latent_channels: int
    pixel_patch: int


VAE_SHAPES = {
    "2.1": VaeShape(
        grouped=False, encoder_dim=96, decoder_dim=96, latent_channels=16, pixel_patch=1
    ),
    "2.2": VaeShape(
        grouped=True, encoder_dim=160, decoder_dim=256, latent_channels=48, pixel_patch=2
    ),
}
_FACTORS = (1, 2, 4, 4)
_RESIDUALS = 2
_IN_TIME = (False, True, True)
"""Which of the encoder's three steps halve frames; the decoder goes the other way."""
_OVERLAP = 0.25
"""Of a tile with its neighbour, as in `models.wan.vae_tiling`."""


def vae_flops(variant: Variant, clip: Clip, direction: Direction, tile: int | None = None) -> float:
    """Return the operations of encoding or decoding one clip with the variant's VAE.

    Args:
        variant: says which VAE.
        clip: its size in pixels and frames; the batch does not count.
        direction: which half of the VAE.
        tile: side of square tiles in pixels; None: whole frames.
    """
    stride = variant.vae_stride[1]
    height, width = (
        _tiled(side // stride, None if tile is None else tile // stride)
        for side in (clip.height, clip.width)
    )
    chunks = clip.latent_frames(variant)
    shape = VAE_SHAPES[variant.vae]
    return height[0] * width[0] * shape_flops(shape, height[1], width[1], chunks, direction)


@lru_cache(maxsize=64)
def shape_flops(
    shape: VaeShape, height: int, width: int, chunks: int, direction: Direction
) -> float:
    """Return the operations for latents of (chunks, height, width); the first chunk is a frame."""
    walk = _encoder if direction == "encode" else _decoder
    cells = height * width
    few = [sum(walk(shape, cells, chunk)) for chunk in range(min(chunks, 3))]
    return sum(few) + max(chunks - 3, 0) * few[-1]


def _tiled(cells: int, tile: int | None) -> tuple[int, int]:
    """Return how many tiles cover so many latent cells, and how many cells each has."""
    if tile is None or tile >= cells:
        return 1, cells
    advance = max(1, tile - round(tile * _OVERLAP))
    return 1 + -(-(cells - tile) // advance), tile


def _encoder(shape: VaeShape, cells: int, chunk: int) -> Iterator[float]:
    """Yield the operations of each layer for one chunk."""
    taps = 1 if chunk == 0 else 3
    frames, pixels = (1 if chunk == 0 else 4), cells * 64
    widths = [shape.encoder_dim * factor for factor in (1, *_FACTORS)]
    yield _conv(3 * shape.pixel_patch**2, widths[0], 9 * taps, frames * pixels)
    for level, (inputs, outputs) in enumerate(pairwise(widths)):
        yield from _residuals(inputs, outputs, _RESIDUALS, taps, frames * pixels)
        if level == len(_IN_TIME):
            break
        pixels //= 4
        yield _conv(outputs, outputs, 9, frames * pixels)
        if _IN_TIME[level] and chunk:
            frames //= 2
            yield _conv(outputs, outputs, 3, frames * pixels)
    yield from _middle(widths[-1], taps, frames, pixels)
    moments = 2 * shape.latent_channels
    yield _conv(widths[-1], moments, 9 * taps, frames * pixels)
    yield _conv(moments, moments, 1, frames * pixels)


def _decoder(shape: VaeShape, cells: int, chunk: int) -> Iterator[float]:
    """Yield the operations of each layer for one chunk."""
    taps = 1 if chunk == 0 else 3
    frames, pixels = 1, cells
    widths = [shape.decoder_dim * factor for factor in (_FACTORS[-1], *reversed(_FACTORS))]
    latent = shape.latent_channels
    yield _conv(latent, latent, 1, pixels)
    yield _conv(latent, widths[0], 9 * taps, pixels)
    yield from _middle(widths[0], taps, frames, pixels)
    for level, (before, outputs) in enumerate(pairwise(widths)):
        inputs = before // 2 if level and not shape.grouped else before
        yield from _residuals(inputs, outputs, _RESIDUALS + 1, taps, frames * pixels)
        if level == len(_IN_TIME):
            break
        if _IN_TIME[::-1][level] and chunk:
            # The first time it runs it has seen nothing yet, and may have a single frame.
            alone = chunk == 1 and frames == 1
            yield _conv(outputs, 2 * outputs, 1 if alone else 3, frames * pixels)
            frames *= 2
        pixels *= 4
        yield _conv(outputs, outputs if shape.grouped else outputs // 2, 9, frames * pixels)
    yield _conv(widths[-1], 3 * shape.pixel_patch**2, 9 * taps, frames * pixels)


def _residuals(inputs: int, outputs: int, count: int, taps: int, pixels: int) -> Iterator[float]:
    for number in range(count):
        channels = outputs if number else inputs
        yield _conv(channels, outputs, 9 * taps, pixels)
        yield _conv(outputs, outputs, 9 * taps, pixels)
        if channels != outputs:
            yield _conv(channels, outputs, 1, pixels)


def _middle(width: int, taps: int, frames: int, pixels: int) -> Iterator[float]:
    """Two residual blocks, and attention among the pixels of a frame between them."""
    yield from _residuals(width, width, 2, taps, frames * pixels)
    yield _conv(width, 4 * width, 1, frames * pixels)
    yield 4.0 * frames * pixels**2 * width


def _conv(inputs: int, outputs: int, taps: int, pixels: int) -> float:
    return 2.0 * taps * inputs * outputs * pixels
