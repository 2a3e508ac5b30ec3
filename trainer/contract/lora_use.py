"""One LoRA file in use: how strongly it acts, on which expert of Wan 2.2, at which step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainer.contract.options import Options

Share = Annotated[float, Field(ge=0, le=1)]


class LoRAUse(Options):
    """One LoRA file and how strongly it acts."""

    path: Path
    """LoRA in any known layout."""
    strength: float = 1.0
    """Multiplier; negative subtracts."""
    expert: Literal["low_noise", "high_noise"] | None = None
    """Wan 2.2: the expert it is for; empty: from the file's metadata or name, else both."""

    @property
    def is_scheduled(self) -> bool:
        """Whether the strength is another one at other steps."""
        return False

    def acts(self, *, high_noise: bool) -> bool:
        """Return whether it does anything at any step of an expert; see `strength_at`."""
        return self.strength != 0

    def with_strength(self, strength: float) -> Self:
        """Return the same LoRA with another strength, on both experts."""
        return self.model_copy(update={"strength": strength})

    def strength_at(self, *, high_noise: bool, share: float) -> float:
        """Return the multiplier of one step.

        Args:
            high_noise: of the step that Wan 2.2's high-noise expert makes.
            share: place of the step in the sample: 0 the first, 1 the last.
        """
        return self.strength


class SampleLoRA(LoRAUse):
    """A LoRA in a sample, whose strength may differ from expert to expert and step to step."""

    strength_high_noise: float | None = None
    """Wan 2.2: multiplier on the high-noise expert; empty: `strength`."""
    schedule: tuple[tuple[Share, float], ...] = ()
    """Points (share of the steps, factor on the strength), straight lines between them; 0 is the
    first step, 1 the last. Two points at one share make a jump. Empty: the same at every step."""

    @model_validator(mode="before")
    @classmethod
    def _of_plain_use(cls, value: Any) -> Any:
        return value.model_dump() if type(value) is LoRAUse else value

    @field_validator("schedule")
    @classmethod
    def _in_order(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        shares = [share for share, _ in points]
        if any(before > after for before, after in pairwise(shares)):
            raise ValueError("the shares of a schedule must not fall")
        if any(shares.count(share) > 2 for share in shares):
            raise ValueError("a schedule has two points at one share at most: before and after")
        return points

    @property
    def is_scheduled(self) -> bool:
        """Whether the strength is another one at other steps."""
        return len({factor for _, factor in self.schedule}) > 1

    def acts(self, *, high_noise: bool) -> bool:
        """Return whether it does anything at any step of an expert; see `strength_at`."""
        factors = [factor for _, factor in self.schedule] or [1.0]
        return self._strength(high_noise=high_noise) != 0 and any(factors)

    def with_strength(self, strength: float) -> Self:
        """Return the same LoRA, schedule and all, with another strength on both experts."""
        return self.model_copy(update={"strength": strength, "strength_high_noise": None})

    def strength_at(self, *, high_noise: bool, share: float) -> float:
        """Return the multiplier of one step; at a jump what comes after it counts."""
        return self._strength(high_noise=high_noise) * _factor(self.schedule, share)

    def _strength(self, *, high_noise: bool) -> float:
        own = self.strength_high_noise if high_noise else None
        return self.strength if own is None else own


def _factor(points: tuple[tuple[float, float], ...], share: float) -> float:
    """Interpolate linearly; before the first point and after the last its factor holds."""
    if not points:
        return 1.0
    reached = [index for index, (at, _) in enumerate(points) if at <= share]
    if not reached:
        return points[0][1]
    start, first = points[reached[-1]]
    if reached[-1] + 1 == len(points):
        return first
    end, last = points[reached[-1] + 1]
    return first + (last - first) * (share - start) / (end - start)
