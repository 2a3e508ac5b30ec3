"""A learning rate that stays where it is."""

from __future__ import annotations

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule


class Constant(LRSchedule):
    """Factor 1 everywhere."""

    class Config(Options):
        """Options of `lr_schedule.kind = "constant"`: none."""

    def __init__(self, config: Constant.Config, build: BuildContext) -> None:
        self.config = config

    def factor(self, progress: float, num_steps: int) -> float:
        """Return 1."""
        return 1.0
