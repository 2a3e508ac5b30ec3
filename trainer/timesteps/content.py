"""Cubic sampling towards noise, where the composition is decided.

Mou et al., T2I-Adapter (arXiv:2302.08453), section 3.4: t = (1 - u³)·T. Takenoko's `content` has
the formula the other way round, that of `style` here.
"""

from __future__ import annotations

from typing import ClassVar

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class Content(DistributionSampler):
    """σ = 1 - u³, u ~ U(0, 1)."""

    name: ClassVar[str] = "content"

    class Config(Options):
        """Options of `objective.timestep_sampler = "content"`: none."""
