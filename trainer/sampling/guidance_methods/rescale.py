"""Guidance rescale (Lin et al., arXiv:2305.08891, 3.4): the spread of the prompt's prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from trainer.contract.denoising_options import DenoisingOptions
from trainer.sampling.guidance import POSITIVE, GuidanceMethod, Step, Velocities


@dataclass(frozen=True, slots=True)
class Rescale(GuidanceMethod):
    """φ·v·std(v_pos)/std(v) + (1 - φ)·v; deviations over all but the batch."""

    share: float

    @classmethod
    def of(cls, options: DenoisingOptions) -> Self | None:
        """Return the method, or None where it is off."""
        return cls(options.guidance_rescale) if options.guidance_rescale else None

    def combine(self, step: Step, seen: Velocities, velocity_BCFHW: Tensor) -> Tensor:
        """Return the velocity, brought back to the spread of the prompt's."""
        wanted, found = _spread(seen[POSITIVE]), _spread(velocity_BCFHW)
        rescaled = velocity_BCFHW * (wanted / found)
        return self.share * rescaled + (1 - self.share) * velocity_BCFHW


def _spread(velocity_BCFHW: Tensor) -> Tensor:
    return velocity_BCFHW.std(dim=(1, 2, 3, 4), keepdim=True)
