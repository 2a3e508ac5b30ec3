"""A learning rate that falls along half a cosine several times (SGDR, arXiv:1608.03983)."""

from __future__ import annotations

import math

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class CosineRestarts(LRSchedule):
    """m + (d^k - m)·(1 + cos(πq)) / 2 at share q of cycle k = 0, 1, …, with the smallest factor m.

    q is the fractional part of progress times the number of cycles, and 1 at the end.
    """

    class Config(Options):
        """Options of `lr_schedule.kind = "cosine_restarts"`."""

        num_cycles: int = Field(2, ge=1)
        """Cycles of equal length; each begins at the top again."""
        cycle_decay: float = Field(1.0, gt=0, le=1)
        """d: each cycle begins at this share of where the one before began."""
        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Learning rate at the end of each cycle, as a share of the full one."""

    def __init__(self, config: CosineRestarts.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        config = self.config
        cycle = min(math.floor(progress * config.num_cycles), config.num_cycles - 1)
        within = progress * config.num_cycles - cycle
        low = config.min_lr_ratio
        high = max(config.cycle_decay**cycle, low)
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * within))
