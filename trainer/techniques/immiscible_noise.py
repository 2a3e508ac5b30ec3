"""Immiscible diffusion: noise that lies nearer to the latents it is mixed with.

Li et al., "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment"
(arXiv:2406.12303), assign the noises of a batch to its images; the same authors' later work
(arXiv:2505.18521) takes the nearest of k noises for each image, which works with batches of one.
This is the latter. Noises of many numbers have nearly the same length, but not quite: taking the
least distance would also take the shorter ones, so that the variance fell below 1. So what counts
is the inner product ⟨latents, noise⟩, which for noises of one length is the distance.
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


class ImmiscibleNoise(Technique):
    """Mix each sample with that of k noises which has the largest inner product with it."""

    reference: ClassVar[str] = "arXiv:2406.12303, arXiv:2505.18521"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL

    class Config(Options):
        """Options of `[[techniques]] name = "immiscible_noise"`."""

        num_candidates: int = Field(4, ge=2, le=64)
        """k, noises that each sample chooses from; each costs its time on the CPU."""

    def __init__(self, config: ImmiscibleNoise.Config, build: BuildContext) -> None:
        self.config = config
        self._seed = build.seed

    def edit_noisy(self, noisy: NoisyInput, batch: Batch, generator: torch.Generator) -> NoisyInput:
        """Return the same samples at the same sigmas with the noises chosen.

        The first candidate is the noise that is there; the choice depends on the seed and the item,
        not on the batch.
        """
        chosen = [
            self._choose(latents, noise, item_seed)
            for latents, noise, item_seed in zip(
                batch.latents_BCFHW.float(), noisy.noise_BCFHW, batch.item_seeds, strict=True
            )
        ]
        return NoisyInput.mix(batch.latents_BCFHW, torch.stack(chosen), noisy.sigma_B)

    def _choose(self, latents_CFHW: Tensor, noise_CFHW: Tensor, item_seed: int) -> Tensor:
        random = stream(self._seed, "immiscible noise", item_seed)
        best, largest = noise_CFHW, (latents_CFHW * noise_CFHW).sum()
        for _ in range(self.config.num_candidates - 1):
            other = torch.randn(noise_CFHW.shape, generator=random).to(noise_CFHW.device)
            product = (latents_CFHW * other).sum()
            # Chosen on the device: asking which is larger would wait for it.
            nearer = product > largest
            best, largest = torch.where(nearer, other, best), torch.maximum(product, largest)
        return best
