"""What a run does again and again: every so many steps, after every so many epochs, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.contract.options import Options


class Repeated(Options):
    """Base of the sections of such things; they say what the two numbers mean for them."""

    if TYPE_CHECKING:  # declared here, they would come first in each section
        every_steps: int
        every_epochs: int

    @property
    def repeats(self) -> bool:
        """Whether it is done on the way, at some steps or epochs."""
        return self.every_steps > 0 or self.every_epochs > 0

    @property
    def interval_key(self) -> str:
        """Which of the two numbers asks for it, for messages."""
        return "every_steps" if self.every_steps or not self.every_epochs else "every_epochs"

    @property
    def in_words(self) -> str:
        """Return how often, as in "every 100 steps and every 2 epochs"."""
        parts = [
            f"every {count} {unit}" if count > 1 else f"every {unit.removesuffix('s')}"
            for count, unit in ((self.every_steps, "steps"), (self.every_epochs, "epochs"))
            if count
        ]
        return " and ".join(parts)

    def times(self, max_steps: int, epochs: int | None) -> int:
        """Return how often it is done in a run, for estimates.

        Args:
            max_steps: of the run.
            epochs: of the run; None: how many it has depends on the clips, and they are left out.
        """
        count = max_steps // self.every_steps if self.every_steps else 0
        if self.every_epochs and epochs:
            count += epochs // self.every_epochs
        return count
