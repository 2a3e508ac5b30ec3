"""From latents to a sample's files: the one way that samples, sheets and sessions write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.sampling.formats.base import Bits
from trainer.sampling.pipeline import VideoDecoder, decode_frames
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import FileOptions, latents_beside, write_files
from trainer.sampling.video_io import AnyFrame

Decode = Callable[[Tensor, Bits], Iterable[AnyFrame]]
"""From latents (1, C, F, H, W) to frames (H, W, 3) of so many bits a colour."""


def decode_with(vae: VideoDecoder, device: torch.device, tile: tuple[int, int] | None) -> Decode:
    """Return how a VAE on `device` decodes; `tile` is (height, width) in pixels."""
    return lambda latents, bits: decode_frames(vae, latents.to(device), tile=tile, bits=bits)


def write_drawn(
    path: Path,
    request: SampleRequest,
    latents_BCFHW: Tensor,
    *,
    decode: Decode | None,
    files: FileOptions,
    metadata: Mapping[str, Any],
    on_latents: Callable[[Path], None] = lambda _path: None,
) -> Path:
    """Decode a sample as its format wants it, and write it.

    Args:
        path: where it goes; see `write_files`.
        request: what was drawn.
        latents_BCFHW: normalised, B = 1.
        decode: makes frames of latents; None where the format holds none.
        files: what kind of file.
        metadata: all that the file says, where `files` wants it.
        on_latents: told of the latents' file beside it, when that is written.

    Raises:
        DiskError: disk full or read-only; nothing is left of this sample.
    """
    bits = files.writer(request.num_frames).bits
    return write_files(
        path,
        () if decode is None else decode(latents_BCFHW, bits),
        num_frames=request.num_frames,
        fps=request.fps,
        metadata=metadata if files.metadata else {},
        files=files,
        latents_BCFHW=latents_BCFHW,
        on_latents=on_latents,
    )


def write_latents_alone(
    path: Path,
    request: SampleRequest,
    latents_BCFHW: Tensor,
    *,
    files: FileOptions,
    metadata: Mapping[str, Any],
) -> Path:
    """Write the latents of a sample that is not decoded, under its name; return where.

    What is there is not replaced, whatever `files` says: nobody asked for this file.

    Raises:
        DiskError: disk full or read-only.
    """
    kind = FileOptions(format="latents", metadata=files.metadata)
    path = latents_beside(path)
    return write_drawn(path, request, latents_BCFHW, decode=None, files=kind, metadata=metadata)
