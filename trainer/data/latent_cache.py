"""Encoded windows: one file a window, named by all that went into it.

Tensors: `latents` (C, F, H, W); for image-to-video variants `extra_channels` (4 + C, F, H, W), the
mask and the latents of the given frames, or for Fun-Control (2C, F, H, W), the latents of the
control video and of the first frame; where the variant has an image encoder `image_context`
(257 or 514, D); for clips with a mask `mask` (1, F, H, W). The name and the key change with the
content of the clip and of what belongs to it, the window, the size, the frame rate, the VAE, the
conditioning and the precision, so an entry that is there is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.contract.dataset_config import SourceFps
from trainer.data.buckets import Bucket
from trainer.data.cache_settings import CacheSettings
from trainer.data.entries import DTYPES, FORMAT_VERSION, LATENTS_SUFFIX, write_entry
from trainer.data.fingerprint import digest
from trainer.data.windows import Window


@dataclass(frozen=True, slots=True)
class LatentEntry:
    """Where an encoded window is (to be) stored."""

    file: str
    """Name in the cache folder."""
    key: str
    window: Window
    bucket: Bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedWindow:
    """What the encoders make of a window; without batch axis."""

    latents_CFHW: Tensor
    extra_channels_CFHW: Tensor | None = None
    image_context_TD: Tensor | None = None
    mask_1FHW: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their name in the file."""
        named = {
            "latents": self.latents_CFHW,
            "extra_channels": self.extra_channels_CFHW,
            "image_context": self.image_context_TD,
            "mask": self.mask_1FHW,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def latent_entry(
    content: str,
    window: Window,
    size: tuple[int, int],
    settings: CacheSettings,
    source_fps: SourceFps | None,
    conditions: Mapping[str, str] | None = None,
) -> LatentEntry:
    """Return the entry of a window of the clip whose content has this hash.

    `conditions` are what else it is made of (`paired.conditions`).
    """
    bucket = Bucket(*size, window.num_frames)
    key = digest(
        {
            "format": FORMAT_VERSION,
            "content": content,
            "window": list(window),
            "bucket": list(bucket),
            "fps": source_fps and [source_fps, settings.target_fps],
            "vae": settings.vae,
            "conditioning": settings.conditioning,
            "image_encoder": settings.image_encoder,
            "dtype": settings.dtype,
            **({"conditions": dict(conditions)} if conditions else {}),
        }
    )
    return LatentEntry(f"{bucket}_{key}{LATENTS_SUFFIX}", key, window, bucket)


def write_latents(
    folder: Path, entry: LatentEntry, encoded: EncodedWindow, settings: CacheSettings, name: str
) -> None:
    """Store an encoded window of the clip `name`.

    Raises:
        DiskError: the disk is full, read-only or gone.
    """
    dtype = DTYPES[settings.dtype]
    metadata = {
        "clip": name,
        "window": f"{entry.window.start}+{entry.window.num_frames}",
        "bucket": str(entry.bucket),
        "conditioning": settings.conditioning,
        "vae": settings.vae or "",
    }
    tensors = {key: tensor.to(dtype) for key, tensor in encoded.tensors.items()}
    write_entry(folder / entry.file, entry.key, tensors, metadata)
