"""Logit-normal sigmas (Esser et al., arXiv:2403.03206, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.flow import apply_flow_shift
from trainer.timesteps.base import DistributionSampler


class LogitNormal(DistributionSampler):
    """σ = sigmoid(m + d·z), z ~ N(0, 1), then moved by the flow shift."""

    name: ClassVar[str] = "logit_normal"

    class Config(Options):
        """Options of `objective.timestep_sampler = "logit_normal"`."""

        logit_mean: float = 0.0
        """m: above 0 prefers noise, below 0 prefers clean latents."""
        logit_std: float = Field(1.0, gt=0)
        """d: width of the distribution."""
        flow_shift: float = Field(1.0, gt=0)
        """s in s·σ / (1 + (s - 1)·σ), applied last."""

    def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
        """Return `num` sigmas, float32."""
        logits = self.options["logit_mean"] + self.options["logit_std"] * torch.randn(
            num, generator=generator
        )
        return apply_flow_shift(torch.sigmoid(logits), self.options["flow_shift"])
