"""Sigmoid-of-normal sigmas, moved towards noise the more the larger a frame is, gently.

As `flux_shift`, with the line through (256 tokens, 0.5) and (8192 tokens, 0.9) of Qwen-Image's
scheduler (`base_shift`, `max_shift`, `max_image_seq_len`), as in musubi-tuner.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class QwenShift(DistributionSampler):
    """σ = s·a / (1 + (s - 1)·a) with a = sigmoid(k·z), s = e^μ, μ linear in a frame's tokens."""

    name: ClassVar[str] = "qwen_shift"

    class Config(Options):
        """Options of `objective.timestep_sampler = "qwen_shift"`."""

        sigmoid_scale: float = Field(1.0, gt=0)
        """k: larger spreads the draws towards both ends."""
