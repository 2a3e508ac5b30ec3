"""Sigma flat over [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class Uniform:
    """σ = u, u ~ U(0, 1)."""

    class Config(Options):
        """Options of `objective.timestep_sampler = "uniform"`: none."""

    def __init__(self, config: Uniform.Config, build: BuildContext) -> None:
        self.config = config

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Return `num` sigmas, float32."""
        return torch.rand(num, generator=generator)
