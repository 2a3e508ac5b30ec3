"""H.265 (HEVC) in mp4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from trainer.sampling.formats.base import Content, VideoFormat, crf_of
from trainer.sampling.video_io import Codec, encode_video

_FEW = 5
_PARAMS: Mapping[str, str] = {"log-level": "error"}


class H265(VideoFormat):
    """8 bits, yuv420p, with the tag `hvc1` that Apple's players ask for."""

    encoder = "libx265"

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return x265 at the CRF of this quality; its scale lies some 4 above x264's."""
        crf = crf_of(quality, usual=20, worst=51)
        options = {"crf": str(crf), "x265-params": _joined(_PARAMS)}
        return Codec(cls.encoder, "mp4", "yuv420p", options, tag="hvc1", even=(2, 2))

    @classmethod
    def write(cls, path: Path, content: Content) -> None:
        """Encode the frames; see `SampleFormat`."""
        frames, codec = iter(content.frames), cls.codec(content.quality)
        first = list(islice(frames, _FEW))
        if len(first) < _FEW:
            # x265 tells the decoding times of B-frames by frames that come later; where there are
            # none it reads past them, and the times, or the process, are broken.
            options = {**codec.options, "x265-params": _joined({**_PARAMS, "bframes": "0"})}
            codec = replace(codec, options=options)
        encode_video(path, chain(first, frames), content.fps, content.metadata, codec)


def _joined(params: Mapping[str, str]) -> str:
    return ":".join(f"{key}={value}" for key, value in params.items())
