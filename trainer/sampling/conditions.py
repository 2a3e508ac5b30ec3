"""Turns a request's texts and files into what the transformer is given beside the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.contract.errors import ConfigError
from trainer.contract.one_frame import OneFrame
from trainer.contract.variants import Variant
from trainer.models.wan.conditioning import (
    LatentEncoder,
    control_conditioning,
    image_conditioning,
    image_context,
    one_frame_conditioning,
)
from trainer.sampling.media import load_frames, load_image
from trainer.sampling.requests import SampleRequest

ImageEncoder = Callable[[Tensor], Tensor]
TextEncoder = Callable[[list[str]], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What holds for every step of one video; all None for text to video."""

    extra_channels_BCFHW: Tensor | None = None
    """Follow the noise on the channel axis."""
    image_context_BTD: Tensor | None = None
    """CLIP tokens."""
    first_latents_BC1HW: Tensor | None = None
    """TI2V-5B image mode: latent frame 0, held fixed."""
    start_latents_BCFHW: Tensor | None = None
    """Video to video: the clean latents that the walk starts near."""
    frame_positions: tuple[int, ...] | None = None
    """One-frame mode: place in time of each latent frame; None: 0, 1, 2, …"""

    def to(self, device: torch.device | str) -> Conditions:
        """Return the same conditions on `device`."""
        return Conditions(
            extra_channels_BCFHW=_moved(self.extra_channels_BCFHW, device),
            image_context_BTD=_moved(self.image_context_BTD, device),
            first_latents_BC1HW=_moved(self.first_latents_BC1HW, device),
            start_latents_BCFHW=_moved(self.start_latents_BCFHW, device),
            frame_positions=self.frame_positions,
        )


def encode_texts(text_encoder: TextEncoder, requests: Iterable[SampleRequest]) -> dict[str, Tensor]:
    """Encode each prompt and each used negative prompt once; (T, D) on the CPU, by text.

    The encoder can be freed afterwards: sampling only looks texts up.
    """
    texts = dict.fromkeys(text for request in requests for text in request.texts)
    with torch.no_grad():
        return {text: text_encoder([text])[0].cpu() for text in texts}


def encode_files(
    request: SampleRequest,
    variant: Variant,
    vae: LatentEncoder | None,
    image_encoder: ImageEncoder | None,
    device: torch.device | str = "cpu",
) -> Conditions:
    """Load and encode the images and videos of a checked request.

    The encoders can be freed afterwards.

    Args:
        request: what to sample.
        variant: decides the construction.
        vae: needed as soon as the request names a file.
        image_encoder: pixels (B, 3, H, W) in [-1, 1] -> (B, 257, 1280); needed by variants with an
            image branch.
        device: where the encoders work.

    Raises:
        ConfigError: an encoder is missing.
        DataError: a file cannot be read.
    """
    first = _pixels(request.image, request, device)
    last = _pixels(request.last_image, request, device)
    if vae is None:
        if not request.files:
            return Conditions()
        raise ConfigError(f"sampling {variant.name} from files needs the VAE", hint="set model.vae")
    with torch.no_grad():
        if request.moments is not None:
            return _one_frame(request, request.moments, variant, vae, image_encoder, device)
        start = None
        if request.video is not None:
            start = vae.encode(_frames(request.video, request, device))
        if request.control is not None:
            control = _frames(request.control, request, device)
            extra = control_conditioning(vae, control, first_image_B3HW=first)
        elif first is None:
            return Conditions(start_latents_BCFHW=start)
        elif variant.per_token_timestep:
            image = vae.encode(first.unsqueeze(2))
            return Conditions(first_latents_BC1HW=image, start_latents_BCFHW=start)
        else:
            extra = image_conditioning(vae, first, request.num_frames, last_image_B3HW=last)
        return Conditions(
            extra_channels_BCFHW=extra,
            image_context_BTD=_image_context(variant, image_encoder, first, last, device),
            start_latents_BCFHW=start,
        )


def _one_frame(
    request: SampleRequest,
    moments: OneFrame,
    variant: Variant,
    vae: LatentEncoder,
    image_encoder: ImageEncoder | None,
    device: torch.device | str,
) -> Conditions:
    images = [
        load_image(path, request.width, request.height).to(device)
        for path in request.control_images or ()
    ]
    positions = moments.positions
    places = [positions.index(index) for index in moments.control_indices]
    return Conditions(
        extra_channels_BCFHW=one_frame_conditioning(vae, images, places),
        image_context_BTD=_image_context(variant, image_encoder, images[0], images[-1], device),
        frame_positions=positions,
    )


def _image_context(
    variant: Variant,
    image_encoder: ImageEncoder | None,
    first_B3HW: Tensor | None,
    last_B3HW: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    shape = variant.transformer
    if shape.image_dim is None:
        return None
    if image_encoder is None:
        raise ConfigError(
            f"{variant.name} needs the image encoder (CLIP)", hint="set model.image_encoder"
        )
    if first_B3HW is None:
        # VideoX-Fun trains control without an image on zeros in the place of the CLIP tokens.
        return torch.zeros_like(image_encoder(torch.zeros(1, 3, 224, 224, device=device)))
    return image_context(
        image_encoder, first_B3HW, last_B3HW if shape.image_position_embedding else None
    )


def _pixels(path: Path | None, request: SampleRequest, device: torch.device | str) -> Tensor | None:
    if path is None:
        return None
    return load_image(path, request.width, request.height).to(device)


def _frames(path: Path, request: SampleRequest, device: torch.device | str) -> Tensor:
    return load_frames(path, request.num_frames, request.width, request.height).to(device)


def _moved(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device)
