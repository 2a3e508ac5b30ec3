"""What the mixtures share: most draws by the frame's size, some very noisy, some nearly clean."""

from __future__ import annotations

from pydantic import Field

from trainer.contract.options import Options
from trainer.timesteps.base import DistributionSampler


class MixtureOptions(Options):
    """Options of a mixture; each has shares of its own."""

    sigmoid_scale: float = Field(1.0, gt=0)
    """k: larger spreads the draws towards both ends."""
    noisy_share: float = Field(0.11, ge=0, le=1)
    """Share of the draws that are as `logsnr` draws."""
    clean_share: float = Field(0.1, ge=0, le=1)
    """Share of the draws that are nearly clean: ln SNR ~ N(5.36, 1)."""
    logsnr_mean: float = -6.0
    """m of the draws as `logsnr`."""
    logsnr_std: float = Field(2.0, gt=0)
    """d of the draws as `logsnr`."""


class MixtureSampler(DistributionSampler):
    """Draws by the frame's size, `logsnr` and ln SNR ~ N(5.36, 1), each with its share."""

    class Config(MixtureOptions):
        """Options of the kind."""
