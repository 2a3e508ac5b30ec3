"""ProRes 422 in mov, for editing programs."""

from __future__ import annotations

from trainer.sampling.formats.base import VideoFormat
from trainer.sampling.video_io import Codec

_PROFILES = 4
_HQ = 3


class ProRes(VideoFormat):
    """10 bits, yuv422p10le, from frames of 16 bits."""

    encoder = "prores_ks"
    bits = 16

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return the profile of this quality: Proxy, LT, 422, and 422 HQ (also for None)."""
        profile = _HQ if quality is None else min(quality * _PROFILES // 100, _HQ)
        # `apl0`: some programs refuse files that do not name Apple as the writer.
        options = {"profile": str(profile), "vendor": "apl0"}
        return Codec(cls.encoder, "mov", "yuv422p10le", options, even=(1, 2))
