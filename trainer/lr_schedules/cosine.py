"""A learning rate that falls along half a cosine (SGDR without restarts, arXiv:1608.03983)."""

from __future__ import annotations

import math

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class Cosine(LRSchedule):
    """m + (1 - m)·(1 + cos(πp)) / 2 for progress p and the smallest factor m."""

    class Config(Options):
        """Options of `lr_schedule.kind = "cosine"`."""

        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Learning rate at the last step, as a share of the full one."""

    def __init__(self, config: Cosine.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        low = self.config.min_lr_ratio
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
