"""Steps without the negative pass: the speed of a model without guidance there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from trainer.contract.denoising_options import CFGSkipMode, DenoisingOptions
from trainer.sampling.guidance import NEGATIVE, GuidanceMethod, Passes, Step


@dataclass(frozen=True, slots=True)
class CFGSkip(GuidanceMethod):
    """Leaves the negative pass out of some steps; modes and shares are musubi-tuner's."""

    mode: CFGSkipMode
    ratio: float

    @classmethod
    def of(cls, options: DenoisingOptions) -> Self | None:
        """Return the method, or None where it is off."""
        if options.cfg_skip_mode == "none":
            return None
        return cls(options.cfg_skip_mode, options.cfg_apply_ratio)

    def passes(self, step: Step, passes: Passes) -> Passes:
        """Return the passes without the negative one where the step goes without guidance."""
        if guided_steps(self.mode, self.ratio, step.num_steps)[step.index]:
            return passes
        return {name: what for name, what in passes.items() if name != NEGATIVE}


def guided_steps(mode: CFGSkipMode, ratio: float, num_steps: int) -> list[bool]:
    """Return for each step whether it has guidance; `ratio` of all do.

    `early`, `late`, `middle` and `early_late` name the steps that go without. `alternate` deals the
    guided ones out evenly, by a sum that is carried along in floating point, as musubi-tuner does:
    where the ratio cannot be written exactly, one step less may be guided.
    """
    if mode == "alternate":
        return _alternate(ratio, num_steps)
    guided = round(ratio * num_steps)
    skipped = num_steps - guided
    if mode == "early":
        return [False] * skipped + [True] * guided
    if mode == "late":
        return [True] * guided + [False] * skipped
    if mode == "middle":
        first = guided // 2
        return [True] * first + [False] * skipped + [True] * (guided - first)
    if mode == "early_late":
        first = skipped // 2
        return [False] * first + [True] * guided + [False] * (skipped - first)
    return [True] * num_steps


def _alternate(ratio: float, num_steps: int) -> list[bool]:
    carried, steps = 0.0, []
    for _ in range(num_steps):
        carried += ratio
        steps.append(carried >= 1)
        carried %= 1
    return steps
