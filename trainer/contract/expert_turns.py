"""Which of Wan 2.2's two experts a step trains: a pure function of the step's number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from trainer.contract.variants import Expert

EXPERTS: tuple[Expert, Expert] = ("high_noise", "low_noise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Steps in groups, shared out between two experts.

    Turn i covers the steps i · G + 1 … (i + 1) · G. After n turns the high-noise expert has had
    n · share of them, rounded (half up), so that the share is met exactly in the long run and to
    half a turn at any time. It is Bresenham's line with `share` as its slope.
    """

    steps_per_turn: int
    """G."""
    high_noise_share: float
    """In (0, 1)."""

    def expert_at(self, step: int) -> Expert:
        """Return whom step `step` trains; the first step is 1."""
        turn = (step - 1) // self.steps_per_turn
        is_high = self._high_turns(turn + 1) > self._high_turns(turn)
        return "high_noise" if is_high else "low_noise"

    def steps_of(self, expert: Expert, steps: int) -> int:
        """Return how many of the first `steps` steps train `expert`."""
        turns, rest = divmod(steps, self.steps_per_turn)
        high = self._high_turns(turns) * self.steps_per_turn
        if rest and self.expert_at(steps) == "high_noise":
            high += rest
        return high if expert == "high_noise" else steps - high

    def changes(self, steps: int) -> int:
        """Return how often the expert changes within the first `steps` steps."""
        turns = -(-steps // self.steps_per_turn)
        firsts = [self.expert_at(turn * self.steps_per_turn + 1) for turn in range(turns)]
        return sum(one != other for one, other in pairwise(firsts))

    def in_words(self, steps: int) -> str:
        """Return what `steps` steps give to each expert; 0: how many is not known yet."""
        parts = []
        for expert in EXPERTS:
            words = f"{expert} {self.share_of(expert):.1%} of the steps"
            if steps:
                words += f" ({self.steps_of(expert, steps):,} of {steps:,})"
            parts.append(words)
        words = f"{', '.join(parts)}; turns of {self.steps_per_turn} steps"
        return f"{words}, {self.changes(steps):,} changes of the expert" if steps else words

    def share_of(self, expert: Expert) -> float:
        """Return an expert's share in the long run."""
        high = self.high_noise_share
        return high if expert == "high_noise" else 1 - high

    def _high_turns(self, turns: int) -> int:
        return math.floor(turns * self.high_noise_share + 0.5)
