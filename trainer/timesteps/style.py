"""Cubic sampling towards clean latents, where texture and detail are decided.

The mirror of `content`. Artistic styles that change forms, too, are learned at high noise
(arXiv:2411.14793): `logsnr` is for those.
"""

from __future__ import annotations

from typing import ClassVar

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class Style(DistributionSampler):
    """σ = u³, u ~ U(0, 1)."""

    name: ClassVar[str] = "style"

    class Config(Options):
        """Options of `objective.timestep_sampler = "style"`: none."""
