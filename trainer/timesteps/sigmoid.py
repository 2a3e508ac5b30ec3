"""Sigma as the sigmoid of a scaled normal: most draws in the middle."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class Sigmoid:
    """σ = sigmoid(k·z), z ~ N(0, 1)."""

    class Config(Options):
        """Options of `objective.timestep_sampler = "sigmoid"`."""

        sigmoid_scale: float = Field(1.0, gt=0)
        """k: larger spreads the draws towards both ends."""

    def __init__(self, config: Sigmoid.Config, build: BuildContext) -> None:
        self.config = config

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Return `num` sigmas, float32."""
        return torch.sigmoid(self.config.sigmoid_scale * torch.randn(num, generator=generator))
