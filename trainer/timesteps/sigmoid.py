"""Sigma as the sigmoid of a scaled normal: most draws in the middle."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class Sigmoid(DistributionSampler):
    """σ = sigmoid(k·z), z ~ N(0, 1)."""

    name: ClassVar[str] = "sigmoid"

    class Config(Options):
        """Options of `objective.timestep_sampler = "sigmoid"`."""

        sigmoid_scale: float = Field(1.0, gt=0)
        """k: larger spreads the draws towards both ends."""

    def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
        """Return `num` sigmas, float32."""
        return torch.sigmoid(self.options["sigmoid_scale"] * torch.randn(num, generator=generator))
