"""CFG-Zero* (Fan et al., arXiv:2503.18886): the negative in its best scale, and a late start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trainer.contract.denoising_options import DenoisingOptions
from trainer.sampling.guidance import (
    NEGATIVE,
    POSITIVE,
    GuidanceMethod,
    Passes,
    Step,
    Velocities,
)

_LEAST = 1e-8


@dataclass(frozen=True, slots=True)
class CFGZeroStar(GuidanceMethod):
    """v = s·v_neg + g·(v_pos - s·v_neg) with the s of `best_scale`; zero at the first steps."""

    init_steps: int

    @classmethod
    def of(cls, options: DenoisingOptions) -> Self | None:
        """Return the method, or None where it is off."""
        return cls(options.cfg_zero_init_steps) if options.cfg_zero_star else None

    def passes(self, step: Step, passes: Passes) -> Passes:
        """Return no passes at the first steps: their velocity is zero."""
        return {} if step.index < self.init_steps else passes

    def adjust(self, step: Step, seen: Velocities) -> Velocities:
        """Return the velocities with the negative one in its best scale."""
        if NEGATIVE not in seen:
            return seen
        scale = best_scale(seen[POSITIVE], seen[NEGATIVE])
        return {**seen, NEGATIVE: scale * seen[NEGATIVE]}


def best_scale(positive_BCFHW: Tensor, negative_BCFHW: Tensor) -> Tensor:
    """Return s* = <v_pos, v_neg> / |v_neg|², (B, 1, 1, 1, 1): the s that brings s·v_neg nearest."""
    positive_BN, negative_BN = positive_BCFHW.flatten(1), negative_BCFHW.flatten(1)
    product_B = (positive_BN * negative_BN).sum(1)
    square_B = torch.square(negative_BN).sum(1)
    return (product_B / (square_B + _LEAST)).view(-1, 1, 1, 1, 1)
