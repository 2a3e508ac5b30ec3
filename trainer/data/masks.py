"""Masks: which part of a clip shall be learned, from pixels to the grid of its latents.

Shape letters: F frames, H/W height and width; after `latent_mask` those of the latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.contract.errors import DataError
from trainer.data.images import read_alpha
from trainer.data.media import Clip, read_pictures, read_window


def read_mask(mask: Clip, frames: range, size: tuple[int, int]) -> Tensor:
    """Return the mask of a window, (F, H, W), in [0, 1]: white is 1, of colours the mean counts.

    A mask of one frame holds for all frames of the clip.

    Raises:
        DataError: it cannot be read.
    """
    if mask.num_frames == 1:
        still = read_window(mask, range(1), size)
        frames_FHW3 = still.expand(len(frames), -1, -1, -1)
    else:
        frames_FHW3 = read_window(mask, frames, size)
    return frames_FHW3.float().mean(dim=-1) / 255


def read_alpha_mask(clip: Clip, frames: range, size: tuple[int, int]) -> Tensor:
    """Return the opacity of a window of images, (F, H, W), in [0, 1]; images without are opaque.

    Raises:
        DataError: an image cannot be read, or the clip is a video file.
    """
    if not clip.images:
        raise no_alpha()
    return read_pictures(clip, frames, size, read_alpha).float()[..., 0] / 255


def no_alpha() -> DataError:
    """Return what is wrong with a video file whose transparency is asked for."""
    return DataError(
        "is a video file, and alpha_mask is for images",
        hint="make a folder of images of it, or use mask_directory",
    )


def latent_mask(mask_FHW: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Return the mean of the mask over what each latent stands for, (1, F, H, W) of the latents.

    The first frame has a latent frame of its own, each further one stands for `stride[0]` frames,
    as in Wan's VAE.

    Args:
        mask_FHW: 4n + 1 frames of a size that the stride divides, in [0, 1].
        stride: pixels per latent along frames, height, width.
    """
    frames, height, width = stride
    cells_FHW = functional.avg_pool2d(mask_FHW[:, None], (height, width))[:, 0]
    rest_FHW = cells_FHW[1:].reshape(-1, frames, *cells_FHW.shape[1:]).mean(dim=1)
    return torch.cat([cells_FHW[:1], rest_FHW])[None]
