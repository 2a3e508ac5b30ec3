"""Latents on disk: Menma's own files, and those that musubi-tuner writes.

musubi-tuner has two: `*_latent.safetensors` of its generation (tensor `latent`, what made it in the
header) and the caches of its training (tensor `latents_{F}x{H}x{W}_{dtype}`, the caption in the
header). All hold normalised latents, as Menma's do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.contract.errors import DataError
from trainer.contract.files import write_bytes
from trainer.sampling.video_io import as_json

SUFFIX = ".safetensors"
_KIND, _SAMPLE, _FPS = "menma.kind", "menma.sample", "menma.fps"
_TENSOR = re.compile(r"latents?|latents_\d+x\d+x\d+_\w+")
_MUSUBI: Mapping[str, tuple[str, type[Any]]] = {
    "prompt": ("prompt", str),
    "caption1": ("prompt", str),
    "negative_prompt": ("negative_prompt", str),
    "seeds": ("seed", int),
    "width": ("width", int),
    "height": ("height", int),
    "video_length": ("num_frames", int),
    "infer_steps": ("num_steps", int),
    "guidance_scale": ("guidance_scale", float),
}
"""musubi-tuner's key of the header -> ours, and its type."""


@dataclass(frozen=True, slots=True)
class LatentFile:
    """The latents of one video, and what the file says of them."""

    latents_CFHW: Tensor
    """Normalised, float32, on the CPU."""
    metadata: Mapping[str, Any]
    fps: float | None
    """None: the file does not say."""


def write_latents(
    path: Path, latents_CFHW: Tensor, metadata: Mapping[str, Any], *, fps: float
) -> None:
    """Write latents as they are, with what made them.

    Raises:
        DiskError: disk full or read-only.
    """
    header = {_KIND: "latents", _FPS: repr(float(fps))}
    if metadata:
        header[_SAMPLE] = as_json(metadata)
    write_bytes(path, save({"latents": latents_CFHW.detach().cpu().contiguous()}, header))


def read_latents(path: Path, channels: int | None = None) -> LatentFile:
    """Read a file of latents, Menma's or musubi-tuner's.

    Args:
        path: the file.
        channels: that the VAE works on; None: any.

    Raises:
        DataError: missing, damaged, no latents, of another VAE, or not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if _TENSOR.fullmatch(name)]  # noqa: SIM118
            if len(names) != 1:
                raise DataError(
                    f"{path} holds no latents of a video",
                    hint="files of `menma sample --format latents` and of musubi-tuner do",
                )
            latents, header = file.get_tensor(names[0]), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if latents.ndim == 5 and latents.shape[0] == 1:
        latents = latents[0]
    _check(path, latents, channels)
    return LatentFile(latents.float(), described(header), _fps(header))


def read_latents_metadata(path: Path) -> dict[str, Any]:
    """Return what made the latents of a file; empty where it does not say.

    Raises:
        DataError: missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return described(dict(file.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def described(header: Mapping[str, str]) -> dict[str, Any]:
    """Return what a header says of the sample, under Menma's names."""
    if _SAMPLE in header:
        with suppress(ValueError, RecursionError):
            stored = json.loads(header[_SAMPLE])
            return stored if isinstance(stored, dict) else {}
    if _KIND in header:
        return {}
    found: dict[str, Any] = {}
    for key, (name, kind) in _MUSUBI.items():
        with suppress(KeyError, ValueError):
            found[name] = kind(header[key])
    return found


def _check(path: Path, latents: Tensor, channels: int | None) -> None:
    if latents.ndim != 4 or 0 in latents.shape:
        raise DataError(f"{path}: its latents have the shape {list(latents.shape)}, not (C,F,H,W)")
    if channels is not None and latents.shape[0] != channels:
        raise DataError(
            f"{path} holds latents of {latents.shape[0]} channels, and this VAE decodes {channels}",
            hint="16 are of Wan 2.1's VAE, 48 of Wan 2.2's: choose the config of that model",
        )
    if not latents.is_floating_point() or not torch.isfinite(latents).all():
        raise DataError(f"{path}: its latents hold values that are not finite numbers")


def _fps(header: Mapping[str, str]) -> float | None:
    with suppress(KeyError, ValueError):
        fps = float(header[_FPS])
        if 0 < fps < 1000:
            return fps
    return None
