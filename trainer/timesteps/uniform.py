"""Sigma flat over [0, 1]."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class Uniform(DistributionSampler):
    """σ = u, u ~ U(0, 1)."""

    name: ClassVar[str] = "uniform"

    class Config(Options):
        """Options of `objective.timestep_sampler = "uniform"`: none."""

    def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
        """Return `num` sigmas, float32."""
        return torch.rand(num, generator=generator)
