"""Single frames of a clip, small enough to look at in a terminal."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from trainer.contract.dataset_config import MediaKind
from trainer.contract.errors import DataError
from trainer.contract.media_kinds import IMAGE_EXTENSIONS
from trainer.data.media import Clip, read_pixels
from trainer.data.resize import Pixels


def kind_of(path: Path) -> MediaKind:
    """Tell whether a path is an image, or a video (a folder of images is one)."""
    return "image" if path.suffix.lower() in IMAGE_EXTENSIONS and not path.is_dir() else "video"


def spread(num_frames: int, count: int) -> list[int]:
    """Return `count` of the numbers below `num_frames`, evenly spread, both ends among them.

    There are no more than `num_frames`; one alone is the middle.
    """
    if count >= num_frames:
        return list(range(num_frames))
    if count == 1:
        return [num_frames // 2]
    return [round(place * (num_frames - 1) / (count - 1)) for place in range(count)]


def chosen(num_frames: int, frames: Sequence[int]) -> list[int]:
    """Return frame numbers with those below 0 counted from the end.

    Raises:
        DataError: the clip is shorter.
    """
    for frame in frames:
        if not -num_frames <= frame < num_frames:
            raise DataError(f"has no frame {frame}: it has {num_frames}")
    return [frame % num_frames for frame in frames]


def fitted(width: int, height: int, max_width: int, max_height: int) -> tuple[int, int]:
    """Return the (width, height) of a picture in a box: aspect kept, never enlarged."""
    scale = min(max_width / width, max_height / height, 1.0)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def read_stills(
    clip: Clip, frames: Sequence[int], size: tuple[int, int]
) -> Iterator[tuple[int, Pixels]]:
    """Yield (frame, image_HW3) in ascending order, each frame once.

    A frame is decoded from the key frame before it, so a few of a long video are found without
    decoding what lies between.

    Raises:
        DataError: a frame is missing or damaged.
    """

    def key_frame(frame: int) -> int:
        return bisect_right(clip.key_pts, clip.pts[clip.source_frames[frame]]) if clip.pts else 0

    for _, group in groupby(sorted(set(frames)), key_frame):
        numbers = list(group)
        yield from zip(numbers, read_pixels(clip, numbers, size), strict=True)
