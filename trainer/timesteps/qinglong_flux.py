"""A mixture: most draws as `flux_shift`, some very noisy, some nearly clean.

The idea and the shares (79 %, 11 %, 10 %) are musubi-tuner's `qinglong_flux`; it
had 80 %, 7.5 % and 12.5 % before.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class QinglongFlux(DistributionSampler):
    """`flux_shift`, `logsnr` and ln SNR ~ N(5.36, 1), each with its share of the draws."""

    name: ClassVar[str] = "qinglong_flux"

    class Config(Options):
        """Options of `objective.timestep_sampler = "qinglong_flux"`."""

        sigmoid_scale: float = Field(1.0, gt=0)
        """k: larger spreads the draws towards both ends."""
        noisy_share: float = Field(0.11, ge=0, le=1)
        """Share of the draws that are as `logsnr` draws."""
        clean_share: float = Field(0.1, ge=0, le=1)
        """Share of the draws that are nearly clean: ln SNR ~ N(5.36, 1)."""
        logsnr_mean: float = -6.0
        """m of the draws as `logsnr`."""
        logsnr_std: float = Field(2.0, gt=0)
        """d of the draws as `logsnr`."""
