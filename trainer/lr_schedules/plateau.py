"""A learning rate that is lowered when the loss stops to fall: torch's ReduceLROnPlateau."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LossSchedule

_KEPT = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What torch's schedule goes by, besides the rate."""


class Plateau(LossSchedule):
    """1 at first; times `lr_factor` whenever the loss has not been below the best for a while."""

    class Config(Options):
        """Options of `lr_schedule.kind = "plateau"`."""

        watch: Literal["validation", "training"] = "validation"
        """Which loss is looked at: each measurement of `[validation]`, or the mean of the training
        loss over `window_steps` steps, which jumps far more."""
        window_steps: int = Field(100, ge=1)
        """With `watch = "training"`: steps whose mean loss is one measurement."""
        patience: int = Field(5, ge=0)
        """How many measurements in a row may miss the best before the rate is lowered."""
        lr_factor: float = Field(0.5, gt=0, lt=1)
        """What it is multiplied with then."""
        threshold: float = Field(0.001, ge=0, lt=1)
        """Share of the best by which a measurement must be below it to count as better."""
        cooldown: int = Field(0, ge=0)
        """Measurements after each lowering that are not counted as missing the best."""
        min_lr_ratio: float = Field(0.0, ge=0, le=1)
        """Smallest learning rate, as a share of the full one."""

    def __init__(self, config: Plateau.Config, build: BuildContext) -> None:
        self.config = config
        self.watches = config.watch
        # torch lowers the rate of an optimizer, so it is given one that trains nothing.
        self._holder = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self._schedule = ReduceLROnPlateau(
            self._holder,
            factor=config.lr_factor,
            patience=config.patience,
            threshold=config.threshold,
            threshold_mode="rel",
            cooldown=config.cooldown,
            min_lr=config.min_lr_ratio,
            eps=0.0,
        )
        self._sum, self._count = 0.0, 0

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier after what was observed so far, at whatever `progress`."""
        return float(self._holder.param_groups[0]["lr"])

    def observe(self, loss: float) -> None:
        """Take the loss of a step, or a measurement of the validation loss."""
        self._sum, self._count = self._sum + loss, self._count + 1
        wanted = self.config.window_steps if self.watches == "training" else 1
        if self._count >= wanted:
            self._schedule.step(self._sum / self._count)
            self._sum, self._count = 0.0, 0

    def state(self) -> dict[str, float]:
        """Return what a resumed run goes on with."""
        held = self._schedule.state_dict()
        kept = {name: held[name] for name in _KEPT if held[name] != float("inf")}
        rate = self._holder.param_groups[0]["lr"]
        return {**kept, "factor": rate, "sum": self._sum, "count": self._count}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Take back what `state` gave."""
        found = dict(state)
        self._holder.param_groups[0]["lr"] = found.pop("factor")
        self._sum, self._count = found.pop("sum"), int(found.pop("count"))
        self._schedule.load_state_dict({"best": float("inf"), **found})
