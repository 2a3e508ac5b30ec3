"""A learning rate that falls late: reflected exponential, REX (arXiv:2107.04197)."""

from __future__ import annotations

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class Rex(LRSchedule):
    """m + (1 - m)·z / (a + (1 - a)·z) with z = 1 - p for progress p and the smallest factor m."""

    class Config(Options):
        """Options of `lr_schedule.kind = "rex"`."""

        alpha: float = Field(0.5, gt=0, le=1)
        """a: 1 is a straight line, smaller values fall later; 0.5 is the paper's."""
        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Learning rate at the last step, as a share of the full one."""

    def __init__(self, config: Rex.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        left, alpha, low = 1.0 - progress, self.config.alpha, self.config.min_lr_ratio
        return low + (1.0 - low) * left / (alpha + (1.0 - alpha) * left)
