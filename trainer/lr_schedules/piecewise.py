"""A learning rate through points that the config lists."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Literal

from pydantic import Field, field_validator

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, LRSchedule

Pair = Annotated[tuple[float, float], Field(min_length=2, max_length=2)]


class Piecewise(LRSchedule):
    """Straight lines between points, or steps at them; flat before the first and after the last."""

    class Config(Options):
        """Options of `lr_schedule.kind = "piecewise"`."""

        points: tuple[Pair, ...] = Field(min_length=1)
        """`[progress, factor]` each: progress in [0, 1] of the course after the warm-up, and the
        factor of the learning rate, 0 or more."""
        shape: Literal["linear", "steps"] = "linear"
        """Lines from point to point, or each point's factor until the next point."""

        @field_validator("points")
        @classmethod
        def _ordered(cls, points: tuple[Pair, ...]) -> tuple[Pair, ...]:
            places = [place for place, _ in points]
            if any(not 0 <= place <= 1 for place in places):
                raise ValueError("the first number of each point is progress, from 0 to 1")
            if any(factor < 0 for _, factor in points):
                raise ValueError("the second number of each point is a factor, 0 or more")
            if sorted(set(places)) != places:
                raise ValueError("each point must have a larger progress than the one before")
            return points

    def __init__(self, config: Piecewise.Config, build: BuildContext) -> None:
        self._places = [place for place, _ in config.points]
        self._factors = [factor for _, factor in config.points]
        self._steps = config.shape == "steps"

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1]."""
        after = bisect_right(self._places, progress)
        if after == 0:
            return self._factors[0]
        before = after - 1
        if self._steps or after == len(self._places):
            return self._factors[before]
        width = self._places[after] - self._places[before]
        share = (progress - self._places[before]) / width
        return self._factors[before] * (1 - share) + self._factors[after] * share
