"""Buckets: the sizes that items are brought to, so that a batch has one shape.

The rule is musubi-tuner's: sizes of about the area of `resolution`, in steps of what the model
needs (16 pixels, 32 for TI2V-5B), and each item goes to the one nearest to its aspect ratio.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from trainer.contract.dataset_config import SharedOptions
from trainer.contract.errors import DataError


class Bucket(NamedTuple):
    """What all items of a batch have in common, in pixels and pixel frames."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


def bucket_sizes(resolution: tuple[int, int], step: int) -> tuple[tuple[int, int], ...]:
    """Return every (width, height) of about the area of `resolution`, sorted.

    One side runs from half the area's root up to the root, the other keeps the area; both are
    multiples of `step`, and each size is there upright, too.

    Raises:
        DataError: the area is smaller than one `step` by one `step`.
    """
    area = resolution[0] * resolution[1]
    root = math.isqrt(area)
    if root < step:
        raise DataError(
            f"resolution {resolution[0]}x{resolution[1]} is too small",
            hint=f"this model needs sides of {step} pixels or more",
        )
    shorter = range(max(_round_down(root // 2, step), step), root + step, step)
    sizes = {(side, _round_down(area // side, step)) for side in shorter}
    sizes = {size for size in sizes if size[1] >= step}
    return tuple(sorted(sizes | {(height, width) for width, height in sizes}))


def choose_size(width: int, height: int, options: SharedOptions, step: int) -> tuple[int, int]:
    """Return the (width, height) that an item of this size is brought to.

    Raises:
        DataError: the item or the resolution is smaller than `step`.
    """
    if not options.enable_bucket:
        size = _round_down(options.resolution[0], step), _round_down(options.resolution[1], step)
        if min(size) < step:
            raise DataError(
                f"resolution {options.resolution[0]}x{options.resolution[1]} is too small",
                hint=f"this model needs sides of {step} pixels or more",
            )
        return size
    area = options.resolution[0] * options.resolution[1]
    if options.bucket_no_upscale and width * height <= area:
        size = _round_down(width, step), _round_down(height, step)
        if min(size) < step:
            raise DataError(f"{width}x{height} is smaller than {step} pixels on a side")
        return size
    ratio = width / height
    return min(
        bucket_sizes(options.resolution, step),
        key=lambda size: (abs(size[0] / size[1] - ratio), size),
    )


def num_tokens(
    bucket: Bucket, vae_stride: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> int:
    """Return the transformer's tokens of one item: latent frames times patches of a frame."""
    latent_frames = (bucket.num_frames - 1) // vae_stride[0] + 1
    rows = bucket.height // (vae_stride[1] * patch_size[1])
    columns = bucket.width // (vae_stride[2] * patch_size[2])
    return latent_frames // patch_size[0] * rows * columns


def _round_down(value: int, step: int) -> int:
    return value // step * step
