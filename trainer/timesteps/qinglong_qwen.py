"""A mixture: most draws as `qwen_shift`, some very noisy, some nearly clean.

The idea and the shares (95 %, 0 %, 5 %) are musubi-tuner's `qinglong_qwen`; it
had 80 %, 7.5 % and 12.5 % before.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.timesteps.mixture import MixtureOptions, MixtureSampler


class QinglongQwen(MixtureSampler):
    """`qwen_shift`, `logsnr` and ln SNR ~ N(5.36, 1), each with its share of the draws."""

    name: ClassVar[str] = "qinglong_qwen"

    class Config(MixtureOptions):
        """Options of `objective.timestep_sampler = "qinglong_qwen"`."""

        noisy_share: float = Field(0.0, ge=0, le=1)
        """Share of the draws that are as `logsnr` draws."""
        clean_share: float = Field(0.05, ge=0, le=1)
        """Share of the draws that are nearly clean: ln SNR ~ N(5.36, 1)."""
