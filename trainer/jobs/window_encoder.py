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
from trainer.data.masks import latent_mask
from trainer.data.media import to_video
from trainer.models.wan.conditioning import (
    control_conditioning,
    image_conditioning,
    image_context,
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedWindow:
    """The pixels of a window and of what belongs to it, all of one size and length."""

    frames_FHW3: Tensor
    """uint8 RGB."""
    control_FHW3: Tensor | None = None
    """Of the control video, for models that are conditioned on one."""
    control_first_frame: bool = False
    """With a control video: the model is given the first frame, too."""
    mask_FHW: Tensor | None = None
    """In [0, 1]."""


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

    def __call__(self, window: DecodedWindow) -> EncodedWindow:
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
                encoded = self._encode(self._vae, window)
        except torch.OutOfMemoryError as error:
            num_frames, height, width = window.frames_FHW3.shape[:3]
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

    def _encode(self, vae: VideoEncoder, window: DecodedWindow) -> EncodedWindow:
        tiled = _Tiled(vae, self._tile)
        video = to_video(window.frames_FHW3)[None]
        latents = tiled.encode(video)
        extra, context = self._conditioning(tiled, video, window)
        mask = None if window.mask_FHW is None else latent_mask(window.mask_FHW, vae.stride)
        return EncodedWindow(
            latents_CFHW=latents[0].cpu(),
            extra_channels_CFHW=None if extra is None else extra[0].cpu(),
            image_context_TD=None if context is None else context[0].cpu(),
            mask_1FHW=mask,
        )

    def _conditioning(
        self, vae: _Tiled, video_B3FHW: Tensor, window: DecodedWindow
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the extra channels and the image context, those that the variant is given."""
        conditioning = self._variant.conditioning
        if conditioning == "none":
            return None, None
        num_frames = video_B3FHW.shape[2]
        first: Tensor | None = video_B3FHW[:, :, 0]
        last = video_B3FHW[:, :, -1] if conditioning == "first_last_frame" else None
        if conditioning == "control":
            assert window.control_FHW3 is not None, "refused in the plan"
            first = first if window.control_first_frame else None
            control = to_video(window.control_FHW3)[None]
            extra = control_conditioning(vae, control, first_image_B3HW=first)
        else:
            assert first is not None
            extra = image_conditioning(
                vae, first, num_frames, last_image_B3HW=last if num_frames > 1 else None
            )
        if self._image_encoder is None:
            return extra, None
        if first is None:  # VideoX-Fun trains control without an image on zeros in its place
            return extra, torch.zeros_like(self._image_encoder(video_B3FHW[:, :, 0]))
        return extra, image_context(self._image_encoder, first, last)


class _Tiled:
    """A VAE that encodes in tiles of one size."""

    def __init__(self, vae: VideoEncoder, tile: tuple[int, int] | None) -> None:
        self._vae = vae
        self._tile = tile
        self.stride = vae.stride

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Encode video in [-1, 1] to normalised latents."""
        return self._vae.encode(video_BCFHW, tile=self._tile)
