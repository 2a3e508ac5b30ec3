"""AV1 in webm."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.sampling.formats.base import Content, VideoFormat, crf_of
from trainer.sampling.video_io import Codec


class AV1(VideoFormat):
    """10 bits, yuv420p10le, from frames of 16 bits."""

    encoder = "libsvtav1"
    bits = 16

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return SVT-AV1 at the CRF of this quality."""
        crf = crf_of(quality, usual=22, worst=63)
        options = {"crf": str(crf), "preset": "6"}
        return Codec(cls.encoder, "webm", "yuv420p10le", options, even=(2, 2))

    @classmethod
    def write(cls, path: Path, content: Content) -> None:
        """Encode the frames; see `SampleFormat`."""
        # The library describes itself in 20 lines on stderr unless it is told to show errors only.
        os.environ.setdefault("SVT_LOG", "1")
        super().write(path, content)
