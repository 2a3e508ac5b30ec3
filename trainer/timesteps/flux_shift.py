"""Sigmoid-of-normal sigmas, moved towards noise the more the larger a frame is.

The line through (256 tokens, 0.5) and (4096 tokens, 1.15) is that of FLUX (Black Forest Labs,
`get_lin_function` and `time_shift` of their sampling code), which musubi-tuner's `flux_shift`
trains with. FLUX makes images: the tokens are those of one latent frame, not of the clip, for which
the line would end at shifts in the hundreds.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class FluxShift(DistributionSampler):
    """σ = s·a / (1 + (s - 1)·a) with a = sigmoid(k·z), s = e^μ, μ linear in a frame's tokens."""

    name: ClassVar[str] = "flux_shift"

    class Config(Options):
        """Options of `objective.timestep_sampler = "flux_shift"`."""

        sigmoid_scale: float = Field(1.0, gt=0)
        """k: larger spreads the draws towards both ends."""
