"""Rough pictures of latents: colours as a linear function of the channels, without a VAE.

The coefficients for the released VAEs are those that ComfyUI publishes and draws its own previews
with (`latent_rgb_factors` of `Wan21` and `Wan22` in its comfy/latent_formats.py). For a VAE of
another size they are fitted by least squares to what that VAE encodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.models.wan.conditioning import LatentEncoder
from trainer.sampling.video_io import Frame, write_png

NUM_FRAMES = 4
"""Of a strip, first and last among them."""
MIN_HEIGHT = 48
"""Pixels of a strip: smaller latents are enlarged, each value as a square."""
_GAP = 2
_NUM_FIT_IMAGES, _FIT_SIZE = 16, 128

_RGB_21 = (
    (
        *(-0.1299, 0.0671, 0.3568, 0.0372, 0.0313, 0.0296, -0.3477, 0.0166),
        *(-0.0412, -0.1293, 0.068, 0.0032, -0.1251, 0.006, 0.3477, 0.1984),
    ),
    (
        *(-0.1692, 0.0406, 0.2548, 0.2344, 0.0189, -0.0956, -0.4059, 0.1902),
        *(0.0267, 0.074, 0.3019, 0.0581, 0.0927, -0.0633, 0.2275, 0.0913),
    ),
    (
        *(0.2932, 0.0442, 0.1747, 0.142, -0.0328, -0.0665, -0.2925, 0.1975),
        *(-0.1364, 0.1636, 0.1128, 0.0639, 0.1699, 0.0005, 0.295, 0.1861),
    ),
)
_BIAS_21 = (-0.1835, -0.0868, -0.3360)
_RGB_22 = (
    (
        *(0.0119, -0.1062, 0.014, -0.0813, 0.0656, 0.0264, 0.0295, -0.0244),
        *(0.0443, -0.0465, 0.0359, -0.0776, 0.0564, 0.0006, -0.0319, -0.0268),
        *(0.0539, -0.0359, -0.0285, 0.1041, -0.0086, 0.039, 0.0069, 0.0006),
        *(0.0313, -0.1454, 0.0714, -0.0304, 0.0401, -0.0758, 0.0568, -0.0055),
        *(0.0239, -0.0663, -0.0416, 0.0166, -0.0211, 0.1833, -0.0368, -0.3441),
        *(-0.0479, -0.066, -0.0101, -0.069, -0.0145, 0.0421, 0.0504, -0.0837),
    ),
    (
        *(0.0103, -0.0504, 0.0409, -0.0677, 0.0851, 0.0463, 0.0326, -0.027),
        *(-0.0102, -0.009, 0.0236, 0.0854, 0.0264, 0.0594, -0.0542, 0.0024),
        *(0.0265, -0.0312, -0.1032, 0.0537, -0.0374, 0.067, 0.0144, -0.0167),
        *(-0.0574, -0.0902, 0.0827, -0.0574, 0.0384, -0.0297, 0.1307, -0.031),
        *(-0.0305, -0.0673, -0.0047, 0.0112, 0.0011, 0.1466, 0.037, -0.3543),
        *(-0.0489, -0.0153, 0.0068, -0.0452, 0.0041, 0.0451, -0.0483, 0.0168),
    ),
    (
        *(0.0046, 0.0165, 0.0491, 0.0607, 0.0808, 0.0912, 0.059, 0.0025),
        *(0.0288, -0.0205, 0.0082, 0.1048, 0.0561, 0.0418, -0.0637, 0.026),
        *(0.0358, -0.0287, -0.1237, 0.0622, -0.0051, 0.2863, 0.0082, 0.0079),
        *(-0.0232, -0.0481, 0.0447, -0.0196, 0.0204, -0.0014, 0.1372, -0.038),
        *(0.0325, -0.014, -0.0023, -0.0093, 0.0331, 0.225, 0.0295, -0.2008),
        *(-0.042, 0.08, 0.0156, -0.0927, 0.0015, 0.0373, -0.0356, 0.0055),
    ),
)
_BIAS_22 = (0.0317, -0.0878, -0.1388)


@dataclass(frozen=True, slots=True)
class Projection:
    """Pixels in [-1, 1] = factors · latents + bias, one pixel for each value of the latents."""

    factors_3C: Tensor
    bias_3: Tensor

    def frames(self, latents_CFHW: Tensor) -> Frame:
        """Return uint8 (F, H, W, 3): a pixel for each place in the latents."""
        latents = latents_CFHW.detach().float()
        factors = self.factors_3C.to(latents.device)
        rgb = torch.einsum("rc,cfhw->fhwr", factors, latents) + self.bias_3.to(latents.device)
        return ((rgb + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu().numpy()


PUBLISHED = {
    "2.1": Projection(torch.tensor(_RGB_21), torch.tensor(_BIAS_21)),
    "2.2": Projection(torch.tensor(_RGB_22), torch.tensor(_BIAS_22)),
}
"""By the version of the VAE."""


def fit_projection(
    vae: LatentEncoder, stride: tuple[int, int, int], device: torch.device
) -> Projection:
    """Return the linear map from a VAE's latents to the mean colours of the pixels they stand for.

    Least squares over images of random colours, soft and in squares, the same ones each time; the
    bias is the coefficient of a channel of ones.

    Args:
        vae: encodes images.
        stride: pixels per latent along frames, height, width.
        device: where the VAE is.
    """
    generator = torch.Generator().manual_seed(0)
    places, colours = [], []
    for index in range(_NUM_FIT_IMAGES):
        cells = 2 ** (1 + index // 2 % 4)
        coarse = torch.rand(1, 3, cells, cells, generator=generator) * 2 - 1
        way = "nearest" if index % 2 else "bicubic"
        image = torch.nn.functional.interpolate(coarse, _FIT_SIZE, mode=way).clamp(-1, 1)
        with torch.no_grad():
            latents_CHW = vae.encode(image[:, :, None].to(device))[0, :, 0].float().cpu()
        pooled = torch.nn.functional.avg_pool2d(image, stride[1:])[0]
        places.append(latents_CHW.flatten(1).T)
        colours.append(pooled.flatten(1).T)
    inputs_NC, targets_N3 = torch.cat(places), torch.cat(colours)
    inputs_NC = torch.cat([inputs_NC, torch.ones(len(inputs_NC), 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs_NC, targets_N3.double()).solution.float()
    return Projection(solution[:-1].T.contiguous(), solution[-1].contiguous())


def write_strip(path: Path, projection: Projection, latents_CFHW: Tensor) -> None:
    """Write some frames of a clip side by side as one small PNG.

    Raises:
        DiskError: disk full or read-only.
    """
    num_frames = latents_CFHW.shape[1]
    chosen = np.linspace(0, num_frames - 1, min(NUM_FRAMES, num_frames)).round().astype(int)
    frames = projection.frames(latents_CFHW[:, torch.from_numpy(chosen)])
    scale = -(-MIN_HEIGHT // frames.shape[1])
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    write_png(path, _side_by_side(list(large)))


def _side_by_side(frames: Sequence[Frame]) -> Frame:
    gap = np.zeros((frames[0].shape[0], _GAP, 3), dtype=np.uint8)
    parts = [part for frame in frames for part in (gap, frame)]
    strip: Frame = np.concatenate(parts[1:], axis=1)
    return strip
