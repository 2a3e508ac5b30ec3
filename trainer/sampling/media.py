"""Images and videos that a sample starts from, brought to its size as training brings its clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trainer.contract.dataset_config import MediaKind
from trainer.contract.errors import DataError
from trainer.data.images import read_image
from trainer.data.media import index_clip, probe, read_pixels, to_video
from trainer.data.resize import resize_cover
from trainer.sampling.video_io import VIDEO_SUFFIXES


def load_image(path: Path, width: int, height: int) -> Tensor:
    """Return pixels_B3HW in [-1, 1], float32, B = 1.

    The image is scaled to cover width x height, and its middle is kept.

    Raises:
        DataError: missing, or not an image.
    """
    with _named(path):
        pixels = resize_cover(read_image(path), width, height)
    return to_video(torch.from_numpy(pixels.copy())[None]).squeeze(1)[None]


def load_frames(path: Path, num_frames: int, width: int, height: int) -> Tensor:
    """Return video_B3FHW in [-1, 1], float32, B = 1, F = num_frames.

    Args:
        path: a video, of which the first frames are taken; a folder of images, in the order of
            their names; or one image, which then stands still.
        num_frames: pixel frames.
        width: pixels.
        height: pixels.

    Raises:
        DataError: missing, unreadable, or too short.
    """
    with _named(path):
        clip = index_clip(path, _kind(path), target_fps=1)
        if _kind(path) == "image":
            frames = [0] * num_frames
        else:
            _check_length(clip.num_frames, num_frames)
            frames = list(range(num_frames))
        pixels = read_pixels(clip, frames, (width, height))
    return to_video(torch.from_numpy(pixels))[None]


def look_at(path: Path, num_frames: int) -> tuple[int, int]:
    """Return width and height of an image or a video as seen, without reading all of it.

    Args:
        path: see `load_frames`.
        num_frames: how many frames it has to have; an image has as many as are needed.

    Raises:
        DataError: missing, unreadable, or too short.
    """
    with _named(path):
        info = probe(path, _kind(path))
        if _kind(path) == "video":
            _check_length(info.num_frames, num_frames)
    return info.width, info.height


def _kind(path: Path) -> MediaKind:
    return "video" if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES else "image"


def _check_length(has: int, needs: int) -> None:
    if has < needs:
        near = max(1, (has - 1) // 4 * 4 + 1)
        raise DataError(
            f"has {has} frames, but the sample needs {needs}",
            hint=f"set num_frames to {near}, or give a longer clip",
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is said against it."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        yield
    except DataError as error:
        raise DataError(f"{path} {error.message}", hint=error.hint) from error
