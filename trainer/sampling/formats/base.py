"""What a kind of file is given and what it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import av
from torch import Tensor

from trainer.contract.errors import RunError
from trainer.sampling.video_io import AnyFrame, Codec, encode_video

Bits = Literal[8, 16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A sample that is to be written."""

    frames: Iterable[AnyFrame]
    """Of as many bits as the format asks for; gone through once at most, one by one."""
    latents_CFHW: Tensor | None = None
    """Normalised, float32; None where there are only frames."""
    fps: float
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What made it; empty: nothing is written of that."""
    quality: int | None = None
    """1 (smallest) to 100 (best); None: what the format takes for visually lossless."""


class SampleFormat(Protocol):
    """Writes samples as one kind of file."""

    bits: ClassVar[Bits]
    """Of a colour, in the frames that it is given."""

    @staticmethod
    def check() -> None:
        """Refuse where this machine cannot write such files.

        Raises:
            RunError: the encoder is not there.
        """
        ...

    @staticmethod
    def write(path: Path, content: Content) -> None:
        """Write the file, which appears whole or not at all.

        Raises:
            DiskError: disk full or read-only.
            ValueError: no frame.
        """
        ...


class VideoFormat:
    """A format of one codec in one container."""

    encoder: ClassVar[str]
    bits: ClassVar[Bits] = 8

    @classmethod
    def codec(cls, quality: int | None) -> Codec:
        """Return how to encode at a quality."""
        raise NotImplementedError

    @classmethod
    def check(cls) -> None:
        """Refuse where this build of PyAV has no such encoder; see `SampleFormat`."""
        require_encoder(cls.encoder)

    @classmethod
    def write(cls, path: Path, content: Content) -> None:
        """Encode the frames; see `SampleFormat`."""
        codec = cls.codec(content.quality)
        encode_video(path, content.frames, content.fps, content.metadata, codec)


def require_encoder(name: str) -> None:
    """Refuse where PyAV cannot encode with `name`.

    Raises:
        RunError: this build has no such encoder.
    """
    try:
        av.Codec(name, "w")
    except (ValueError, av.FFmpegError):  # PyAV's own error is a ValueError
        raise RunError(
            f"this build of PyAV {av.__version__} has no encoder {name}",
            hint="choose another --format, or install the wheel of PyAV: pip install --upgrade av",
        ) from None


def crf_of(quality: int | None, usual: int, worst: int) -> int:
    """Return a constant rate factor: `usual` for None, else 1 for quality 100 and `worst` for 1."""
    if quality is None:
        return usual
    return round(1 + (100 - quality) / 99 * (worst - 1))
