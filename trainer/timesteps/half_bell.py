"""The rising half of a bell over sigma, then flat: clean latents are rare, noisy ones are not.

As Takenoko's `half_bell`; ostris' ai-toolkit has the same shape as a weight of the loss.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class HalfBell(DistributionSampler):
    """Density proportional to exp(-½((σ - c) / d)²) below c and to 1 above it, on [0, 1]."""

    name: ClassVar[str] = "half_bell"

    class Config(Options):
        """Options of `objective.timestep_sampler = "half_bell"`."""

        bell_center: float = Field(0.5, ge=0, le=1)
        """c: from this sigma on all are drawn alike."""
        bell_std: float = Field(0.2, gt=0)
        """d: width of the bell that rises up to it."""
