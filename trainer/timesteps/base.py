"""What timestep samplers share: each draws from a distribution of `trainer.contract`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trainer.contract.options import Options
from trainer.contract.sigma_distributions import SigmaDistribution
from trainer.contract.timestep_mass import sigma_distribution
from trainer.core.seams import BuildContext


class DistributionSampler:
    """A sampler that is known by its distribution alone; a kind adds its name and options."""

    name: ClassVar[str]
    """In the catalog."""

    class Config(Options):
        """Options of the kind."""

    def __init__(self, config: Options, build: BuildContext) -> None:
        self.options = config.model_dump()

    def distribution(self, frame_tokens: int) -> SigmaDistribution:
        """Return what is drawn from, for latents with so many tokens a frame."""
        return sigma_distribution(self.name, self.options, frame_tokens)

    def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
        """Return `num` sigmas, float32: the quantiles of uniform draws."""
        shares = torch.rand(num, generator=generator, dtype=torch.float64).tolist()
        quantile = self.distribution(frame_tokens).quantile
        return torch.tensor([quantile(share) for share in shares], dtype=torch.float32)
