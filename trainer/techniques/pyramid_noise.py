"""Multi-resolution noise: the noise of coarser and coarser grids on top of each other.

Whitaker, "Multi-Resolution Noise for Diffusion Model Training" (wandb.ai, 2023): each level has
half the size of the one before, is enlarged to the frame and counts less. There the sum is divided
by its standard deviation over the frame; enlarged noise varies less between its grid points, so
some places stay noisier than others. Here each enlarged level and the sum are divided by what their
variance is at each place, so that every number of the noise is N(0, 1) as in sampling, and only
their correlation is new.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.rng import generator as stream
from trainer.core.seams import BuildContext, Maturity, Technique
from trainer.core.types import Batch, NoisyInput


class PyramidNoise(Technique):
    """noise' = Σ dⁱ·levelᵢ / √(Σ d²ⁱ), where level 0 is the noise and level i has 1/2ⁱ its size."""

    reference: ClassVar[str] = "Whitaker, Multi-Resolution Noise, 2023"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL

    class Config(Options):
        """Options of `[[techniques]] name = "pyramid_noise"`."""

        discount: float = Field(0.3, gt=0, lt=1)
        """d: how much a level counts relative to the one before."""
        num_levels: int = Field(6, ge=1, le=10)
        """Coarser levels at most; the coarsest one has a single number a channel and frame."""

    def __init__(self, config: PyramidNoise.Config, build: BuildContext) -> None:
        self.config = config
        self._seed = build.seed

    def edit_noisy(self, noisy: NoisyInput, batch: Batch, generator: torch.Generator) -> NoisyInput:
        """Return the same samples at the same sigmas with other noises, each by its item's seed."""
        noise = noisy.noise_BCFHW
        coarse = torch.stack([self._coarse(noise, seed) for seed in batch.item_seeds])
        discounts = [self.config.discount**level for level in self._levels(noise)]
        variance = 1 + sum(discount**2 for discount in discounts)
        mixed = (noise + coarse.to(noise.device)) / variance**0.5
        return NoisyInput.mix(batch.latents_BCFHW, mixed, noisy.sigma_B)

    def _coarse(self, noise_BCFHW: Tensor, item_seed: int) -> Tensor:
        """Return the sum of the coarser levels of one item, (C, F, H, W)."""
        random = stream(self._seed, "pyramid noise", item_seed)
        channels, frames, height, width = noise_BCFHW.shape[1:]
        total = torch.zeros(channels, frames, height, width)
        for level in self._levels(noise_BCFHW):
            rows, columns = max(height >> level, 1), max(width >> level, 1)
            grid = torch.randn(channels, frames, rows, columns, generator=random)
            down, across = _enlarging(rows, height), _enlarging(columns, width)
            total += self.config.discount**level * (down @ grid @ across.T)
        return total

    def _levels(self, noise_BCFHW: Tensor) -> range:
        longer = max(noise_BCFHW.shape[-2:])
        return range(1, min(self.config.num_levels, longer.bit_length() - 1) + 1)


def _enlarging(points: int, length: int) -> Tensor:
    """Return the matrix of linear interpolation from `points` to `length`, (length, points).

    Its rows have the length 1: independent N(0, 1) at the points give N(0, 1) at each place.
    """
    weights: Tensor = torch.nn.functional.interpolate(
        torch.eye(points)[None], size=length, mode="linear", align_corners=False
    )[0].T
    lengths: Tensor = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    return weights / lengths
