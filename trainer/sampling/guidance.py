"""Guidance: which passes a step makes through the transformer, and one velocity of their results.

Classifier-free guidance (Ho & Salimans, arXiv:2207.12598) is the base: a pass with the prompt, one
with the negative prompt, and a step away from the latter. A `GuidanceMethod` changes the passes or
what is made of them; methods work in a row and know nothing of one another.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from torch import Tensor

from trainer.contract import passes as planned
from trainer.contract.catalog import GUIDANCE_METHODS
from trainer.contract.denoising_options import DenoisingOptions
from trainer.contract.variants import Expert

POSITIVE: Final = planned.POSITIVE
NEGATIVE: Final = planned.NEGATIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where in the sampling of a video a velocity is asked for."""

    index: int
    """From 0."""
    num_steps: int
    timestep: float
    expert: Expert
    guidance_scale: float
    """Of this expert."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of the latents through the transformer."""

    text: str
    """What it is conditioned on."""
    skipped_blocks: frozenset[int] = frozenset()
    """Blocks that it leaves out."""


Passes = Mapping[str, Pass]
"""Name -> pass; the base's are `POSITIVE` and `NEGATIVE`. Without any the velocity is zero."""
Velocities = Mapping[str, Tensor]
"""Name of a pass -> velocity_BCFHW, float32."""


class GuidanceMethod:
    """Changes nothing; a method overrides what it needs."""

    __slots__ = ()

    @classmethod
    def of(cls, options: DenoisingOptions) -> Self | None:
        """Return the method; None: the options leave it off."""
        raise NotImplementedError

    def passes(self, step: Step, passes: Passes) -> Passes:
        """Return the passes of `step`, given those that the methods before ask for."""
        return passes

    def adjust(self, step: Step, seen: Velocities) -> Velocities:
        """Return what classifier-free guidance shall see in the place of the passes' velocities."""
        return seen

    def combine(self, step: Step, seen: Velocities, velocity_BCFHW: Tensor) -> Tensor:
        """Return the velocity to take, given the one so far and those of the passes."""
        return velocity_BCFHW


def methods_of(options: DenoisingOptions) -> list[GuidanceMethod]:
    """Return the methods that are on, in the order of their registry."""
    found = (GUIDANCE_METHODS.load(entry.name).of(options) for entry in GUIDANCE_METHODS)
    return [method for method in found if method is not None]


def planned_passes(
    step: Step, prompt: str, negative_prompt: str, methods: Sequence[GuidanceMethod] = ()
) -> Passes:
    """Return the passes that `step` makes; at a guidance scale of 1 none with the negative."""
    passes: Passes = {POSITIVE: Pass(prompt)}
    if needs_negative(step.guidance_scale):
        passes = {POSITIVE: Pass(prompt), NEGATIVE: Pass(negative_prompt)}
    for method in methods:
        passes = method.passes(step, passes)
    return passes


def combined_velocity(
    step: Step, seen: Velocities, methods: Sequence[GuidanceMethod] = ()
) -> Tensor:
    """Return v_neg + g·(v_pos - v_neg), as changed by the methods; v_pos without a negative."""
    adjusted = seen
    for method in methods:
        adjusted = method.adjust(step, adjusted)
    velocity = adjusted[POSITIVE]
    if NEGATIVE in adjusted:
        negative = adjusted[NEGATIVE]
        velocity = negative + step.guidance_scale * (velocity - negative)
    for method in methods:
        velocity = method.combine(step, seen, velocity)
    return velocity


def needs_negative(guidance_scale: float) -> bool:
    """Return whether this guidance needs the pass with the negative prompt."""
    return guidance_scale != 1
