"""What turns timesteps, CLIP features and latents into what the blocks work on.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width, L tokens,
S image tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product.

    Same parameters and same result as `nn.Conv3d`; the memory order is channels last, so that
    the tokens need no copy, and bfloat16 needs no kernel that only some cuDNN versions have.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that nn.Conv3d gave it
        """Map (B, C, F, H, W) to (B, D, F/f, H/h, W/w) for a patch of (f, h, w)."""
        b, c, *size = input.shape
        f, h, w = self.kernel_size
        patches = input.reshape(b, c, size[0] // f, f, size[1] // h, h, size[2] // w, w)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class ImageEmbedding(nn.Module):
    """CLIP features (B, S, image_dim) to tokens (B, S, D); FLF2V adds positions first."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        # These norms are the only ones with torch's eps of 1e-5, this GELU the only exact one.
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        if positions is None:
            self.emb_pos = None
        else:
            self.emb_pos = nn.Parameter(torch.empty(1, positions, image_dim))

    def forward(self, features_BSD: Tensor) -> Tensor:
        """Return the image tokens."""
        if self.emb_pos is not None:
            features_BSD = features_BSD + self.emb_pos
        tokens: Tensor = self.proj(features_BSD)
        return tokens


def sinusoid(timestep_U: Tensor, size: int) -> Tensor:
    """Return [cos, sin] of timestep / 10000^(i / half), (U, size) float32, angles in float64."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep_U.device) / half
    angles = torch.outer(timestep_U.double(), torch.exp(-math.log(10000) * exponents))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def distinct_timesteps(timestep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the timesteps to embed and, unless it is one per sample, the row of every token.

    Args:
        timestep: (B,) or (B, L).
    """
    if timestep.dim() == 1:
        return timestep, None
    if bool((timestep == timestep[:, :1]).all()):
        return timestep[:, 0], None
    rows_U, row_BL = torch.unique(timestep, return_inverse=True)
    return rows_U, row_BL
