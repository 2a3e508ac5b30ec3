"""PNG: an image, or a folder of the frames of a video."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from trainer.sampling.formats.base import Bits, Content
from trainer.sampling.video_io import write_frames, write_png


class PNG:
    """Every pixel as it was decoded; the text chunk of each file says what made it."""

    bits: ClassVar[Bits] = 8

    @staticmethod
    def check() -> None:
        """Every build has it."""

    @staticmethod
    def write(path: Path, content: Content) -> None:
        """Write an image where `path` ends in .png, else a folder; see `SampleFormat`."""
        frames = iter(content.frames)
        if path.suffix.lower() != ".png":
            write_frames(path, frames, content.metadata)
            return
        first = next(frames, None)
        if first is None:
            raise ValueError("an image needs a frame")
        write_png(path, first, content.metadata)
