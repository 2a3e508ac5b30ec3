"""What a step cache knows of a model: measured by `menma sample --calibrate`, or published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from trainer.contract.errors import ConfigError
from trainer.contract.files import write_text
from trainer.contract.options import Options
from trainer.contract.variants import Expert

FORMAT: Final = "menma-step-cache-1"
MAX_BYTES: Final = 1_000_000
Form = Literal["plain", "retention"]
"""TeaCache's input: the timestep's embedding, or its projection that the blocks are given."""
Ratios = tuple[Annotated[float, Field(gt=0)], ...]


class Polynomial(Options):
    """From the distance of two inputs to that of what the blocks make of them."""

    coefficients: tuple[float, ...] = Field(min_length=1, max_length=9)
    """Highest power first."""
    lowest: float | None = None
    """Smallest distance that it was fitted to; None: not known."""
    highest: float | None = None
    """Largest distance that it was fitted to."""

    def __call__(self, distance: float) -> float:
        """Return the polynomial; outside of what it was fitted to, a line through the origin."""
        inside = distance
        if self.lowest is not None and self.highest is not None:
            inside = min(max(distance, self.lowest), self.highest)
        value = float(np.polyval(self.coefficients, inside))
        return value if inside == distance or not inside else value * distance / inside


class ExpertValues(Options):
    """Of one transformer."""

    magcache: dict[str, Ratios] = Field(default_factory=dict)
    """Pass -> size of what the blocks add to the tokens at each step, over that of the step
    before; the first is 1."""
    teacache: dict[Form, Polynomial] = Field(default_factory=dict)
    """Form -> polynomial."""
    teacache_threshold: float | None = None
    """What its authors recommend; None: the method's own."""


class Calibration(Options):
    """A calibration's file."""

    format: Literal["menma-step-cache-1"] = FORMAT
    """Says what the file is."""
    variant: str
    """Model variant."""
    models: dict[Expert, str]
    """Fingerprint of each transformer's weights."""
    num_steps: int = Field(ge=1)
    """Steps of the prompts that were measured."""
    flow_shift: float
    """Shift of their sigmas."""
    num_prompts: int = Field(ge=1)
    """How many there were."""
    experts: dict[Expert, ExpertValues]
    """What was found."""


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    hint = "menma sample --calibrate writes such files"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is too large for a calibration", hint=hint)
        return Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", hint=hint) from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        what = f" at {place}" if place else ""
        raise ConfigError(
            f"{path} is not a calibration: {error.errors()[0]['msg']}{what}", hint=hint
        ) from error


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration, whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    write_text(path, calibration.model_dump_json(indent=1, exclude_none=True) + "\n")


@dataclass(frozen=True, slots=True)
class StepCacheValues:
    """What is known of the model at hand."""

    measured: Calibration | None = None
    published: bool = False
    """The model has the shape of a released one, whose published values hold."""

    def of(self, variant: str, num_pixels: int) -> Mapping[Expert, ExpertValues]:
        """Return the values of each expert: what was measured, else what is published.

        Args:
            variant: its name.
            num_pixels: width times height, by which published values differ.
        """
        from trainer.sampling.step_cache.published import published_values

        if self.measured is not None:
            return self.measured.experts
        found = published_values(variant, num_pixels) if self.published else None
        return {} if found is None else {"low_noise": found}
