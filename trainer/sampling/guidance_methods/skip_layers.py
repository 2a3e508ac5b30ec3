"""Skip-layer guidance: away from what the model makes without some of its blocks.

The idea is that of Stability AI for Stable Diffusion 3.5; modes and options are musubi-tuner's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self

from torch import Tensor

from trainer.contract import passes as planned
from trainer.contract.denoising_options import DenoisingOptions
from trainer.sampling.guidance import (
    NEGATIVE,
    POSITIVE,
    GuidanceMethod,
    Passes,
    Step,
    Velocities,
)

SKIPPING: Final = planned.SKIPPING
"""The pass with the prompt that leaves blocks out."""


@dataclass(frozen=True, slots=True)
class SkipLayers(GuidanceMethod):
    """v + scale·(v_pos - v_skipping) by a pass of its own, or blocks left out of the negative."""

    layers: frozenset[int]
    scale: float
    start: float
    end: float
    own_pass: bool

    @classmethod
    def of(cls, options: DenoisingOptions) -> Self | None:
        """Return the method, or None where it is off."""
        if options.slg_mode == "none":
            return None
        return cls(
            layers=frozenset(options.slg_layers),
            scale=options.slg_scale,
            start=options.slg_start,
            end=options.slg_end,
            own_pass=options.slg_mode == "original",
        )

    def passes(self, step: Step, passes: Passes) -> Passes:
        """Return the passes with one that leaves blocks out, within the share of the steps."""
        if not planned.skips_layers(self.start, self.end, step.index, step.num_steps):
            return passes
        source = POSITIVE if self.own_pass else NEGATIVE
        if source not in passes:
            return passes
        name = SKIPPING if self.own_pass else NEGATIVE
        return {**passes, name: replace(passes[source], skipped_blocks=self.layers)}

    def combine(self, step: Step, seen: Velocities, velocity_BCFHW: Tensor) -> Tensor:
        """Return the velocity, moved away from that of the pass that left blocks out."""
        if SKIPPING not in seen:
            return velocity_BCFHW
        return velocity_BCFHW + self.scale * (seen[POSITIVE] - seen[SKIPPING])
