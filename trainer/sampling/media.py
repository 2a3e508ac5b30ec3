"""Images and videos that a sample starts from: read, cover the size asked for, crop the middle."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainer.contract.errors import DataError
from trainer.sampling.video_io import VIDEO_SUFFIXES, read_frames

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def load_image(path: Path, width: int, height: int) -> Tensor:
    """Return pixels_B3HW in [-1, 1], float32, B = 1.

    The image is scaled to cover width x height (Lanczos) and its middle is kept, as training does.

    Raises:
        DataError: missing, or not an image.
    """
    return _to_pixels(_fit(_open_image(path), width, height)).unsqueeze(0)


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
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        images = [_open_image(file) for file in files[:num_frames]]
    elif path.suffix.lower() in VIDEO_SUFFIXES:
        images = [Image.fromarray(frame) for frame in islice(read_frames(path), num_frames)]
    else:
        images = [_open_image(path)] * num_frames
    if len(images) < num_frames:
        raise DataError(
            f"{path} has {len(images)} frames, but the sample needs {num_frames}",
            hint="lower num_frames or give a longer clip",
        )
    frames = [_to_pixels(_fit(image, width, height)) for image in images]
    return torch.stack(frames, dim=1).unsqueeze(0)


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise DataError(f"{path} is not an image that can be read: {error}") from error


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def _to_pixels(image: Image.Image) -> Tensor:
    pixels_HW3 = torch.from_numpy(np.asarray(image).copy())
    return pixels_HW3.permute(2, 0, 1).float() / 127.5 - 1
