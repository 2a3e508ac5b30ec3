"""What image- and control-conditioned Wan models are given beside noise and text.

One home for cache and sampling, so that a model never sees another construction while sampling than
the one it was trained with. Layouts are those of the Wan 2.1 / 2.2 repositories and, for
`control_conditioning`, of VideoX-Fun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class LatentEncoder(Protocol):
    """The part of a Wan VAE that conditioning needs."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent along frames, height, width."""
        ...

    def encode(self, video: Tensor, /) -> Tensor:
        """Encode video_B3FHW in [-1, 1] to normalised latents_BCFHW."""
        ...


def image_conditioning(
    vae: LatentEncoder,
    first_image_B3HW: Tensor,
    num_frames: int,
    *,
    last_image_B3HW: Tensor | None = None,
) -> Tensor:
    """Return the channels that I2V and FLF2V transformers see after the noise.

    The conditioning latents are those of the whole clip [first, grey, grey, … (, last)]: the VAE's
    latent of grey is not zero, so the padded clip has to pass through it.

    Args:
        vae: encodes and gives its stride.
        first_image_B3HW: pixels in [-1, 1].
        num_frames: pixel frames of the video, 4N + 1.
        last_image_B3HW: pixels of the last frame; None leaves the end open.

    Returns:
        (B, 4 + C, F, H, W), the 4 mask channels first, dtype and device of the VAE's latents.

    Raises:
        ValueError: one frame only and a last image, or images of two sizes.
    """
    clip = first_image_B3HW.new_zeros(
        (*first_image_B3HW.shape[:2], num_frames, *first_image_B3HW.shape[2:])
    )
    clip[:, :, 0] = first_image_B3HW
    if last_image_B3HW is not None:
        if num_frames < 2 or last_image_B3HW.shape != first_image_B3HW.shape:
            raise ValueError("a last image needs two frames or more and the first image's size")
        clip[:, :, -1] = last_image_B3HW
    latents = vae.encode(clip)
    mask = frame_mask(num_frames, vae.stride[0], last=last_image_B3HW is not None)
    mask_BMFHW = (
        mask[None, :, :, None, None]
        .to(latents)
        .expand(latents.shape[0], -1, -1, *latents.shape[3:])
    )
    return torch.cat([mask_BMFHW, latents], dim=1)


def one_frame_conditioning(
    vae: LatentEncoder, images_B3HW: Sequence[Tensor], places: Sequence[int]
) -> Tensor:
    """Return the channels of I2V and FLF2V transformers in musubi-tuner's one-frame mode.

    Every picture is a latent frame of its own, encoded alone and marked as given; the one left is
    the frame to be made, grey.

    Args:
        vae: encodes.
        images_B3HW: pixels in [-1, 1], one after the other.
        places: latent frame of each, of len(images) + 1.

    Returns:
        (B, 4 + C, F, H, W), the 4 mask channels first, dtype and device of the VAE's latents.
    """
    grey = vae.encode(torch.zeros_like(images_B3HW[0]).unsqueeze(2))
    frames = [grey] * (len(images_B3HW) + 1)
    for place, image in zip(places, images_B3HW, strict=True):
        frames[place] = vae.encode(image.unsqueeze(2))
    latents = torch.cat(frames, dim=2)
    mask = torch.zeros_like(latents[:, :1]).repeat(1, vae.stride[0], 1, 1, 1)
    mask[:, :, list(places)] = 1
    return torch.cat([mask, latents], dim=1)


def frame_mask(num_frames: int, frame_stride: int = 4, *, last: bool = False) -> Tensor:
    """Return the mask of given frames, (frame_stride, F), float32: 1 given, 0 to be made.

    Pixel frame 0 fills its latent frame alone and is repeated; a given last frame marks the last
    of the pixel frames that share the last latent frame: (0, 0, 0, 1).
    """
    given = torch.zeros(num_frames)
    given[0] = 1
    if last:
        given[-1] = 1
    per_pixel_frame = torch.cat([given[:1].expand(frame_stride), given[1:]])
    return per_pixel_frame.view(-1, frame_stride).T.contiguous()


def control_conditioning(
    vae: LatentEncoder,
    control_video_B3FHW: Tensor,
    *,
    first_image_B3HW: Tensor | None = None,
) -> Tensor:
    """Return the channels of Fun-Control models: control latents, then image latents.

    The image latents fill latent frame 0 only; every other frame, and all of them when there is no
    image, is zero. No mask channels.

    Args:
        vae: encodes.
        control_video_B3FHW: poses, edges, depth, … in [-1, 1], as long as the video.
        first_image_B3HW: pixels of the frame to start from.

    Returns:
        (B, 2·C, F, H, W), dtype and device of the VAE's latents.
    """
    control = vae.encode(control_video_B3FHW)
    image = torch.zeros_like(control)
    if first_image_B3HW is not None:
        image[:, :, :1] = vae.encode(first_image_B3HW.unsqueeze(2))
    return torch.cat([control, image], dim=1)


def image_context(
    image_encoder: Callable[[Tensor], Tensor],
    first_image_B3HW: Tensor,
    last_image_B3HW: Tensor | None = None,
) -> Tensor:
    """Return the CLIP tokens of one image, (B, 257, 1280), or of two, (B, 514, 1280).

    Two images are for transformers with an image position embedding (FLF2V), first then last.
    """
    tokens = image_encoder(first_image_B3HW)
    if last_image_B3HW is None:
        return tokens
    return torch.cat([tokens, image_encoder(last_image_B3HW)], dim=1)


def keep_first_frame(latents_BCFHW: Tensor, image_latents_BC1HW: Tensor) -> Tensor:
    """Return `latents` with latent frame 0 replaced by the image's (TI2V-5B image mode)."""
    return torch.cat([image_latents_BC1HW.to(latents_BCFHW), latents_BCFHW[:, :, 1:]], dim=2)


def first_frame_timestep(
    timestep_B: Tensor, latent_size: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Tensor:
    """Return one timestep per token (B, L): 0 on latent frame 0, `timestep_B` elsewhere.

    TI2V-5B image mode. Tokens run over frames, then height, then width.

    Args:
        timestep_B: 1000·sigma of each item.
        latent_size: latent frames, height and width.
        patch_size: the transformer's, along frames, height and width.
    """
    frames, height, width = (
        size // patch for size, patch in zip(latent_size, patch_size, strict=True)
    )
    timestep_BL = timestep_B.unsqueeze(1).repeat(1, frames * height * width)
    timestep_BL[:, : height * width] = 0
    return timestep_BL
