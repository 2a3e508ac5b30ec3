"""Sigmoid-of-normal sigmas moved towards noise by the flow shift, as samplers use it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.flow import apply_flow_shift
from trainer.timesteps.base import DistributionSampler


class Shift(DistributionSampler):
    """σ = s·a / (1 + (s - 1)·a) with a = sigmoid(k·z), z ~ N(0, 1)."""

    name: ClassVar[str] = "shift"

    class Config(Options):
        """Options of `objective.timestep_sampler = "shift"`."""

        flow_shift: float = Field(3.0, gt=0)
        """s: 1 leaves the middle in the middle, larger trains more on noisy latents."""
        sigmoid_scale: float = Field(1.0, gt=0)
        """k: larger spreads the draws towards both ends."""

    def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
        """Return `num` sigmas, float32."""
        normal = torch.randn(num, generator=generator)
        return apply_flow_shift(
            torch.sigmoid(self.options["sigmoid_scale"] * normal), self.options["flow_shift"]
        )
