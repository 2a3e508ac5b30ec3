"""At which steps of a run something is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How often something is due; 0 means never."""

    steps: int = 0
    epochs: int = 0
    """It is due at the step that ends so many, or that is the first one after their end."""
    epoch_after: Callable[[int], float] = float
    """Gives the epochs that were seen after a step."""

    def __bool__(self) -> bool:
        """Return whether it is ever due."""
        return self.steps > 0 or self.epochs > 0

    def due(self, step: int) -> bool:
        """Return whether it is due after this step, counted from 1."""
        if self.steps and step % self.steps == 0:
            return True
        if not self.epochs:
            return False
        before, now = self.epoch_after(step - 1), self.epoch_after(step)
        return now // self.epochs > before // self.epochs


NEVER = Interval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """At which steps something is due."""

    total_steps: int
    checkpoint: Interval = NEVER
    output: Interval = NEVER
    validation: Interval = NEVER
    """Where there is some, the last step is followed by one, too."""
    validate_first: bool = False
    """Measure before saving, so that what is saved knows of it."""
    validate_at_start: bool = False
    sample: Interval = NEVER
    sample_at_start: bool = False
