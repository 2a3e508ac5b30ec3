"""Noise with a common part: each channel of a sample is moved as a whole.

Guttenberg, "Diffusion With Offset Noise" (crosslabs.org, 2023), for models whose last step still
showed the data's mean brightness. Rectified flow has no such leak, σ = 1 is pure noise; what is
left is that large areas get noise that small ones cannot average out. The sum is divided by √(1 +
s²), so that every number of the noise is N(0, 1) as in sampling, and only their correlation is new.
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


class NoiseOffset(Technique):
    """noise' = (noise + s·offset) / √(1 + s²), with one offset ~ N(0, 1) a channel."""

    reference: ClassVar[str] = "Guttenberg, Diffusion With Offset Noise, 2023"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL

    class Config(Options):
        """Options of `[[techniques]] name = "noise_offset"`."""

        strength: float = Field(0.05, gt=0, le=1)
        """s: size of the common part, relative to the noise."""
        per_frame: bool = False
        """An offset for each latent frame instead of one for the whole clip."""

    def __init__(self, config: NoiseOffset.Config, build: BuildContext) -> None:
        self.config = config
        self._seed = build.seed

    def edit_noisy(self, noisy: NoisyInput, batch: Batch, generator: torch.Generator) -> NoisyInput:
        """Return the same samples at the same sigmas with other noises, each by its item's seed."""
        noise = noisy.noise_BCFHW
        offsets = torch.stack([self._offset(noise, seed) for seed in batch.item_seeds])
        strength = self.config.strength
        mixed = (noise + strength * offsets.to(noise.device)) / (1 + strength**2) ** 0.5
        return NoisyInput.mix(batch.latents_BCFHW, mixed, noisy.sigma_B)

    def _offset(self, noise_BCFHW: Tensor, item_seed: int) -> Tensor:
        channels, frames = noise_BCFHW.shape[1:3]
        random = stream(self._seed, "noise offset", item_seed)
        return torch.randn(channels, frames if self.config.per_frame else 1, 1, 1, generator=random)
