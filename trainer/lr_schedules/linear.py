"""A learning rate that falls in a straight line."""

from __future__ import annotations

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class Linear(LRSchedule):
    """1 - (1 - m)·p for progress p and the smallest factor m."""

    class Config(Options):
        """Options of `lr_schedule.kind = "linear"`."""

        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Learning rate at the last step, as a share of the full one."""

    def __init__(self, config: Linear.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        return 1.0 - (1.0 - self.config.min_lr_ratio) * progress
