"""H.265 (HEVC) in mp4."""

from __future__ import annotations

from trainer.sampling.formats.base import VideoFormat, crf_of
from trainer.sampling.video_io import Codec


class H265(VideoFormat):
    """8 bits, yuv420p, with the tag `hvc1` that Apple's players ask for."""

    encoder = "libx265"

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return x265 at the CRF of this quality; its scale lies some 4 above x264's."""
        crf = crf_of(quality, usual=20, worst=51)
        options = {"crf": str(crf), "x265-params": "log-level=error"}
        return Codec(cls.encoder, "mp4", "yuv420p", options, tag="hvc1", even=(2, 2))
