"""Still images as 8-bit RGB."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trainer.contract.errors import DataError

# What Pillow's readers raise on damaged files; SyntaxError is a broken PNG or JPEG 2000.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an image as it is meant to be seen, (H, W, 3).

    EXIF orientation is applied; transparency is laid over white; 16 bits are brought to 8.

    Raises:
        DataError: the file is no image, damaged, animated, or of floating-point values.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise DataError("is an animation, not an image", hint="make a video of it")
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except _PILLOW_ERRORS as error:
        raise DataError(f"is no readable image: {_reason(error)}") from None


def read_alpha(path: Path) -> NDArray[np.uint8]:
    """Return the opacity of an image as it is meant to be seen, (H, W, 3), three times the same.

    An image without transparency is opaque (255).

    Raises:
        DataError: the file is no image, or damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            seen = ImageOps.exif_transpose(image)
            if not seen.has_transparency_data:
                return np.full((seen.height, seen.width, 3), 255, np.uint8)
            alpha = np.asarray(seen.convert("RGBA").getchannel("A"))
    except _PILLOW_ERRORS as error:
        raise DataError(f"is no readable image: {_reason(error)}") from None
    return np.repeat(alpha[:, :, None], 3, axis=2)


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height as seen, from the header alone.

    Raises:
        DataError: the file is no image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in {5, 6, 7, 8}  # EXIF orientation
            width, height = image.size
    except _PILLOW_ERRORS as error:
        raise DataError(f"is no readable image: {_reason(error)}") from None
    return (height, width) if turned else (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("holds floating-point values", hint="save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scaling
        values = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    text = str(error).split("\n")[0]
    if "cannot identify" in text or not text:
        return "its content is of no known image format"
    return text
