"""A bell over sigma, cut off at 0 and 1."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class Bell(DistributionSampler):
    """Density proportional to exp(-½((σ - c) / d)²) on [0, 1]."""

    name: ClassVar[str] = "bell"

    class Config(Options):
        """Options of `objective.timestep_sampler = "bell"`."""

        bell_center: float = Field(0.5, ge=0, le=1)
        """c: the sigma that is drawn most."""
        bell_std: float = Field(0.2, gt=0)
        """d: width of the bell."""
