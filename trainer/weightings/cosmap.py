"""The cosine schedule mapped to rectified flow (Esser et al., arXiv:2403.03206, section 3.1)."""

from __future__ import annotations

import math

from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class CosMap:
    """w(σ) = 2 / (π·(1 - 2σ + 2σ²)): 1.27 in the middle, 0.64 at both ends, mean 1."""

    class Config(Options):
        """Options of `objective.weighting = "cosmap"`: none."""

    def __init__(self, config: CosMap.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Return one weight per sample."""
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B.square()))
