"""Normal in the logarithm of the signal-to-noise ratio (Choi et al., arXiv:2411.14793).

For rectified flow SNR = ((1 - σ) / σ)², so that λ = ln SNR gives σ = sigmoid(-λ / 2). The paper's
"style-friendly" sampler has mean -6: styles are learned at high noise.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class LogSNR(DistributionSampler):
    """σ = sigmoid(-λ / 2), λ ~ N(m, d²)."""

    name: ClassVar[str] = "logsnr"

    class Config(Options):
        """Options of `objective.timestep_sampler = "logsnr"`."""

        logsnr_mean: float = -6.0
        """m: the logarithm of the signal-to-noise ratio; below 0 prefers noise."""
        logsnr_std: float = Field(2.0, gt=0)
        """d: width of the distribution."""
