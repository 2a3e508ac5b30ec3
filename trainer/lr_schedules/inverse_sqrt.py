"""A learning rate that falls as one over the root of the step (arXiv:2106.04560)."""

from __future__ import annotations

import math

from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class InverseSqrt(LRSchedule):
    """max(m, √(T / (T + t))) at step t after the warm-up, with a time scale T.

    It does not depend on the length of the run, which may be extended later.
    """

    class Config(Options):
        """Options of `lr_schedule.kind = "inverse_sqrt"`."""

        timescale_steps: int = Field(1000, ge=1)
        """T: after three times so many steps the rate is half of the full one."""
        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Smallest learning rate, as a share of the full one."""

    def __init__(self, config: InverseSqrt.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1] of a course of `num_steps`."""
        scale = self.config.timescale_steps
        step = progress * (num_steps - 1)
        return max(self.config.min_lr_ratio, math.sqrt(scale / (scale + step)))
