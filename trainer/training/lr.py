"""The learning rate of each step: linear warm-up, then the schedule's course."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.core.seams import LossSchedule, LRSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """Learning rate as a pure function of the step, so that resuming needs no state."""

    base: float
    warmup_steps: int
    total_steps: int
    schedule: LRSchedule

    def __call__(self, step: int) -> float:
        """Return the learning rate of update number `step`, counted from 1.

        The warm-up reaches the full rate at step `warmup_steps`; the schedule then runs from 0 at
        the next step to 1 at the last one.
        """
        if step <= self.warmup_steps:
            return self.base * step / self.warmup_steps
        span = self.total_steps - self.warmup_steps - 1
        progress = (step - self.warmup_steps - 1) / span if span > 0 else 0.0
        return self.base * self.schedule.factor(min(progress, 1.0), max(span + 1, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWatch:
    """Tells a schedule the losses that it goes by, once the warm-up is over."""

    schedule: LossSchedule
    warmup_steps: int

    @property
    def of_validation(self) -> bool:
        """Whether it goes by the validation loss."""
        return self.schedule.watches == "validation"

    def trained(self, step: int, loss: float) -> None:
        """Tell the training loss of a step, counted from 1."""
        if not self.of_validation and step >= self.warmup_steps:
            self.schedule.observe(loss)

    def validated(self, step: int, loss: float) -> None:
        """Tell the validation loss after a step; 0: before the first one."""
        if self.of_validation and step >= self.warmup_steps:
            self.schedule.observe(loss)
