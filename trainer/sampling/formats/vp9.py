"""VP9 in webm."""

from __future__ import annotations

from trainer.sampling.formats.base import VideoFormat, crf_of
from trainer.sampling.video_io import Codec


class VP9(VideoFormat):
    """8 bits, yuv420p; odd sizes stay as they are."""

    encoder = "libvpx-vp9"

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return libvpx at the CRF of this quality."""
        crf = crf_of(quality, usual=20, worst=63)
        # A bit rate of 0 lets the CRF alone decide.
        options = {"crf": str(crf), "b": "0", "row-mt": "1", "cpu-used": "2"}
        return Codec(cls.encoder, "webm", "yuv420p", options)
