"""No weighting: every sigma counts the same."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class Unweighted:
    """w(σ) = 1."""

    class Config(Options):
        """Options of `objective.weighting = "none"`: none."""

    def __init__(self, config: Unweighted.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(sigma_B)
