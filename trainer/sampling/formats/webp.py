"""WebP, still or moving; what made it is in the EXIF description."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, features

from trainer.contract.errors import RunError
from trainer.contract.files import atomic_path
from trainer.sampling.formats.base import Bits, Content
from trainer.sampling.video_io import EXIF_DESCRIPTION, as_json

_USUAL = 90


class WebP:
    """Lossy below quality 100, lossless there; loops without end."""

    bits: ClassVar[Bits] = 8

    @staticmethod
    def check() -> None:
        """See `SampleFormat`."""
        if not features.check("webp"):
            raise RunError(
                "this build of Pillow cannot write WebP",
                hint="choose another --format, or install the wheel of Pillow",
            )

    @staticmethod
    def write(path: Path, content: Content) -> None:
        """Encode the frames; see `SampleFormat`."""
        pictures = (Image.fromarray(frame) for frame in content.frames)
        first, second = next(pictures, None), next(pictures, None)
        if first is None:
            raise ValueError("a video needs a frame")
        quality = content.quality or _USUAL
        exif = Image.Exif()
        if content.metadata:
            exif[EXIF_DESCRIPTION] = as_json(content.metadata, ascii_only=True)
        options: dict[str, Any] = {
            "format": "WEBP",
            "quality": quality,
            "lossless": quality == 100,
            "exif": exif,
        }
        with atomic_path(path) as temporary:
            if second is None:
                first.save(temporary, **options)
                return
            rest = [second, *pictures]
            # Delays are whole milliseconds; times, not delays, are rounded, so nothing adds up.
            times = [round(1000 * index / content.fps) for index in range(len(rest) + 2)]
            delays = [after - before for before, after in pairwise(times)]
            first.save(
                temporary,
                **options,
                save_all=True,
                append_images=rest,
                duration=delays,
                loop=0,
            )
