"""From the frames of a window to the tensors that are cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from trainer.contract.errors import DataError, OutOfMemoryError
from trainer.contract.variants import Variant
from trainer.data.cache_settings import uses_image_encoder
from trainer.data.latent_cache import EncodedWindow
from trainer.data.media import to_video
from trainer.models.wan.conditioning import image_conditioning, image_context

T_co = TypeVar("T_co", covariant=True)

TextEncoding = Callable[[Sequence[str]], Sequence[Tensor]]
"""Captions to one (T, D) each, unpadded, at most `text_len` long."""
ImageEncoding = Callable[[Tensor], Tensor]
"""images_B3HW in [-1, 1] to (B, 257, D)."""


class VideoEncoder(Protocol):
    """The part of a VAE that caching needs."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent along frames, height, width."""
        ...

    def encode(self, video_BCFHW: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
        """Encode video in [-1, 1] to normalised latents_BCFHW."""
        ...


@dataclass(frozen=True, slots=True)
class LazyModel(Generic[T_co]):
    """A model that is loaded when it is needed, and who it is."""

    identity: str
    """`trainer.data.fingerprint.model_identity` of its file; other weights, other identity."""
    load: Callable[[], T_co]


class WindowEncoder:
    """Frames to what is stored, by models that are loaded when the first window comes."""

    def __init__(
        self,
        variant: Variant,
        vae: LazyModel[VideoEncoder],
        image_encoder: LazyModel[ImageEncoding] | None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self._variant = variant
        self._lazy_vae = vae
        self._lazy_image_encoder = image_encoder if uses_image_encoder(variant) else None
        self._tile = tile
        self._vae: VideoEncoder | None = None
        self._image_encoder: ImageEncoding | None = None

    def __call__(self, frames_FHW3: Tensor) -> EncodedWindow:
        """Encode a window.

        Raises:
            DataError: the result is not finite.
            OutOfMemoryError: the device is too small.
        """
        if self._vae is None:
            self._vae = self._lazy_vae.load()
            if self._lazy_image_encoder is not None:
                self._image_encoder = self._lazy_image_encoder.load()
        try:
            with torch.inference_mode():
                encoded = self._encode(self._vae, to_video(frames_FHW3)[None])
        except torch.OutOfMemoryError as error:
            num_frames, height, width = frames_FHW3.shape[:3]
            raise OutOfMemoryError(
                f"the device cannot encode {num_frames} frames of {width}x{height}: {error}",
                hint="set memory.vae_tile, or lower resolution or target_frames of the dataset",
            ) from error
        for name, tensor in encoded.tensors.items():
            if not torch.isfinite(tensor).all():
                raise DataError(
                    f"its {name.replace('_', ' ')} came out as NaN or infinite",
                    hint='set memory.vae_dtype = "fp32"',
                )
        return encoded

    def _encode(self, vae: VideoEncoder, video_B3FHW: Tensor) -> EncodedWindow:
        tiled = _Tiled(vae, self._tile)
        latents = tiled.encode(video_B3FHW)
        if self._variant.conditioning == "none":
            return EncodedWindow(latents_CFHW=latents[0].cpu())
        num_frames = video_B3FHW.shape[2]
        first, last = video_B3FHW[:, :, 0], None
        if self._variant.conditioning == "first_last_frame":
            last = video_B3FHW[:, :, -1]
        extra = image_conditioning(
            tiled, first, num_frames, last_image_B3HW=last if num_frames > 1 else None
        )
        context = None
        if self._image_encoder is not None:
            context = image_context(self._image_encoder, first, last)[0].cpu()
        return EncodedWindow(
            latents_CFHW=latents[0].cpu(),
            extra_channels_CFHW=extra[0].cpu(),
            image_context_TD=context,
        )


class _Tiled:
    """A VAE that encodes in tiles of one size."""

    def __init__(self, vae: VideoEncoder, tile: tuple[int, int] | None) -> None:
        self._vae = vae
        self._tile = tile
        self.stride = vae.stride

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Encode video in [-1, 1] to normalised latents."""
        return self._vae.encode(video_BCFHW, tile=self._tile)
