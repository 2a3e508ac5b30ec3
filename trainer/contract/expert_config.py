"""Sections of the config for models with two experts (Wan 2.2 A14B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from trainer.contract.options import Options


class ExpertsSection(Options):
    """Wan 2.2 with `model.expert = "both"` or `"shared"`: how the experts take turns."""

    steps_per_turn: int = Field(20, ge=1)
    """Steps before the other expert's turn; one with more than half of them has several turns in a
    row. Each change copies the weights of an expert from RAM."""
    high_noise_share: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = "auto"
    """Share of the steps that train the high-noise expert; `auto`: the share of the timestep
    sampler's draws that are at the boundary or above."""

    @field_validator("high_noise_share", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:  # it has a message for each kind of value that would do
            raise PydanticCustomError(
                "choice", 'should be a number above 0 and below 1, or "auto"'
            ) from None


class ExpertSection(Options):
    """Wan 2.2: what is special to one expert, whenever it is trained."""

    min_timestep: float | None = Field(None, ge=0, le=1000)
    """Smallest timestep that it is trained at; empty: from `[objective]` and the boundary."""
    max_timestep: float | None = Field(None, ge=0, le=1000)
    """Largest timestep that it is trained at; empty: from `[objective]` and the boundary."""
    learning_rate: float | None = Field(None, gt=0)
    """Its step size after the warm-up; empty: `optimizer.learning_rate`."""
    flow_shift: float | None = Field(None, gt=0)
    """Flow shift of its timestep sampler; empty: that of `[objective]`."""
