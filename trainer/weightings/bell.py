"""A bell over sigma: noise levels far from its center count less.

ostris' ai-toolkit weighs training on rectified flow by such a bell.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.contract.sigma_distributions import BellSigma
from trainer.core.seams import BuildContext


class BellWeight:
    """w(σ) proportional to exp(-½((σ - c) / d)²), with the mean 1 over σ in [0, 1]."""

    class Config(Options):
        """Options of `objective.weighting = "bell"`."""

        weighting_center: float = Field(0.5, ge=0, le=1)
        """c: the sigma that counts most."""
        weighting_std: float = Field(0.3, gt=0)
        """d: width of the bell."""

    def __init__(self, config: BellWeight.Config, build: BuildContext) -> None:
        self.config = config
        self._peak = BellSigma(config.weighting_center, config.weighting_std).density(
            config.weighting_center
        )

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Return one weight per sample."""
        place = (sigma_B - self.config.weighting_center) / self.config.weighting_std
        return self._peak * (-0.5 * place.square()).exp()
