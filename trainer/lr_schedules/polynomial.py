"""A learning rate that falls as a power of what is left of the run."""

from __future__ import annotations

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class Polynomial(LRSchedule):
    """m + (1 - m)·(1 - p)^n for progress p and the smallest factor m."""

    class Config(Options):
        """Options of `lr_schedule.kind = "polynomial"`."""

        power: float = Field(2.0, gt=0)
        """n: 1 is a straight line, above 1 falls fast at first, below 1 falls late."""
        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Learning rate at the last step, as a share of the full one."""

    def __init__(self, config: Polynomial.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        low = self.config.min_lr_ratio
        return float(low + (1.0 - low) * (1.0 - progress) ** self.config.power)
