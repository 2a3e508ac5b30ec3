"""A learning rate that stays, and falls in the last part of the run (arXiv:2404.06395)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class WarmupStableDecay(LRSchedule):
    """1, then m + (1 - m)·f(q) at share q of the last part; `lr_schedule.warmup_…` comes before.

    f is 1 - q, (1 + cos(πq)) / 2, or 1 - √q (arXiv:2405.18392).
    """

    class Config(Options):
        """Options of `lr_schedule.kind = "warmup_stable_decay"`."""

        decay_ratio: float = Field(0.2, gt=0, le=1)
        """Share of the course, without the warm-up, in which the rate falls."""
        decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
        """How it falls: f."""
        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Learning rate at the last step, as a share of the full one."""

    def __init__(self, config: WarmupStableDecay.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        config = self.config
        within = min(max(0.0, 1.0 - (1.0 - progress) / config.decay_ratio), 1.0)
        if config.decay_shape == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * within))
        elif config.decay_shape == "one_minus_sqrt":
            share = 1.0 - math.sqrt(within)
        else:
            share = 1.0 - within
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share
