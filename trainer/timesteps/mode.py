"""Mode sampling with heavy tails (Esser et al., arXiv:2403.03206, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class Mode(DistributionSampler):
    """σ = 1 - u - s·(cos²(πu/2) - 1 + u), u ~ U(0, 1): no σ is ever rare."""

    name: ClassVar[str] = "mode"

    class Config(Options):
        """Options of `objective.timestep_sampler = "mode"`."""

        mode_scale: float = Field(1.29, ge=-1, le=1.75)
        """s: 0 is flat, above it prefers the middle, below it both ends."""
