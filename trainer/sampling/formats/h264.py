"""H.264 in mp4."""

from __future__ import annotations

from trainer.sampling.formats.base import VideoFormat, crf_of
from trainer.sampling.video_io import Codec, h264


class H264(VideoFormat):
    """8 bits, yuv420p."""

    encoder = "libx264"

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return x264 at the CRF of this quality; 17 is visually lossless."""
        return h264(crf_of(quality, usual=17, worst=51))
