"""A mixture: most draws as `flux_shift`, some very noisy, some nearly clean.

The idea and the shares (79 %, 11 %, 10 %) are musubi-tuner's `qinglong_flux`; it
had 80 %, 7.5 % and 12.5 % before.
"""

from __future__ import annotations

from typing import ClassVar

from trainer.timesteps.mixture import MixtureOptions, MixtureSampler


class QinglongFlux(MixtureSampler):
    """`flux_shift`, `logsnr` and ln SNR ~ N(5.36, 1), each with its share of the draws."""

    name: ClassVar[str] = "qinglong_flux"

    class Config(MixtureOptions):
        """Options of `objective.timestep_sampler = "qinglong_flux"`."""
