"""Immiscible diffusion: noise that lies nearer to the latents it is mixed with.

Li et al., "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment"
(arXiv:2406.12303), assign the noises of a batch to its images; the same authors' later work
(arXiv:2505.18521) takes the nearest of k noises for each image, which works with batches of one.
Both are here. Noises of many numbers have nearly the same length, but not quite: taking the
least distance would also take the shorter ones, so that the variance fell below 1. So what counts
is the inner product ⟨latents, noise⟩, which for noises of one length is the distance. Where noises
are only dealt out anew, Σ‖noise‖² is what it is, and both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.assignment import assign
from trainer.core.rng import generator as stream
from trainer.core.seams import BuildContext, Maturity, Need, Technique
from trainer.core.types import Batch, NoisyInput


class ImmiscibleNoise(Technique):
    """Mix samples with those of several noises that have large inner products with them."""

    reference: ClassVar[str] = "arXiv:2406.12303, arXiv:2505.18521"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL

    class Config(Options):
        """Options of `[[techniques]] name = "immiscible_noise"`."""

        assignment: Literal["nearest", "batch"] = "nearest"
        """`nearest`: each sample takes the best of its own noises. `batch`: the noises of all
        samples of a batch are dealt out, one to each, so that their sum is the best."""
        num_candidates: int = Field(4, ge=1, le=64)
        """k, noises drawn for each sample; each costs its time on the CPU. 1 goes with `batch`
        only: the paper's assignment, which draws no more noises than without it."""

    def __init__(self, config: ImmiscibleNoise.Config, build: BuildContext) -> None:
        self.config = config
        self._seed = build.seed

    @classmethod
    def needs_of(cls, options: Options) -> frozenset[Need]:
        """Return that a batch has several samples where one noise each is dealt out."""
        assert isinstance(options, cls.Config)
        alone = options.num_candidates == 1
        return cls.needs | (frozenset({Need.BATCH_OVER_ONE}) if alone else frozenset())

    def edit_noisy(self, noisy: NoisyInput, batch: Batch, generator: torch.Generator) -> NoisyInput:
        """Return the same samples at the same sigmas with the noises chosen.

        The first candidate of each is the noise that is there. With `nearest` the choice depends on
        the seed and the item, with `batch` also on what else is in the batch.
        """
        choose = self._choose_each if self.config.assignment == "nearest" else self._choose_together
        latents_BCFHW = batch.latents_BCFHW.float()
        chosen = choose(latents_BCFHW, noisy.noise_BCFHW, batch.item_seeds)
        return NoisyInput.mix(batch.latents_BCFHW, torch.stack(chosen), noisy.sigma_B)

    def _choose_each(
        self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, item_seeds: Sequence[int]
    ) -> list[Tensor]:
        return [
            self._choose(latents, noise, item_seed)
            for latents, noise, item_seed in zip(
                latents_BCFHW, noise_BCFHW, item_seeds, strict=True
            )
        ]

    def _choose(self, latents_CFHW: Tensor, noise_CFHW: Tensor, item_seed: int) -> Tensor:
        best, largest = noise_CFHW, (latents_CFHW * noise_CFHW).sum()
        for drawn in self._others(noise_CFHW, item_seed):
            other = drawn.to(noise_CFHW.device)
            product = (latents_CFHW * other).sum()
            # Chosen on the device: asking which is larger would wait for it.
            nearer = product > largest
            best, largest = torch.where(nearer, other, best), torch.maximum(product, largest)
        return best

    def _choose_together(
        self, latents_BCFHW: Tensor, noise_BCFHW: Tensor, item_seeds: Sequence[int]
    ) -> list[Tensor]:
        pool = list(noise_BCFHW)
        for noise, item_seed in zip(noise_BCFHW, item_seeds, strict=True):
            pool += self._others(noise, item_seed)
        flat, device = latents_BCFHW.flatten(1), noise_BCFHW.device
        # The pool may be large, so one at a time is on the device.
        products_PB = torch.stack([flat @ noise.to(device).flatten() for noise in pool])
        chosen = assign(-products_PB.T.double().cpu().numpy())
        return [pool[place].to(device) for place in chosen]

    def _others(self, noise_CFHW: Tensor, item_seed: int) -> Iterator[Tensor]:
        """Yield the k - 1 further noises of an item, on the CPU."""
        random = stream(self._seed, "immiscible noise", item_seed)
        for _ in range(self.config.num_candidates - 1):
            yield torch.randn(noise_CFHW.shape, generator=random)
