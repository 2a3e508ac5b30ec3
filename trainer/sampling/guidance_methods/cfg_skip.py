"""Steps without the negative pass: the speed of a model without guidance there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from trainer.contract.denoising_options import CFGSkipMode, DenoisingOptions
from trainer.contract.passes import guided_steps
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
