"""Min-SNR weighting for rectified flow (Hang et al., arXiv:2303.09556).

The paper weighs the error of the clean estimate by min(SNR, γ). Rectified flow has SNR = ((1 - σ) /
σ)², and the clean estimate's error is σ·(v̂ - v), so the velocity's error gets σ²·min(SNR, γ) =
min((1 - σ)², γ·σ²). Like the paper's weight of v-prediction, min(SNR, γ) / (SNR + 1), it goes to 0
at both ends.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.loss_weights import min_snr_mean
from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class MinSNR:
    """w(σ) = min((1 - σ)², γ·σ²) over its mean; it peaks at σ = 1 / (1 + √γ)."""

    class Config(Options):
        """Options of `objective.weighting = "min_snr"`."""

        min_snr_gamma: float = Field(5.0, gt=0)
        """γ: the largest signal-to-noise ratio that counts in full."""

    def __init__(self, config: MinSNR.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Return one weight per sample."""
        gamma = self.config.min_snr_gamma
        weight = torch.minimum((1 - sigma_B).square(), gamma * sigma_B.square())
        return weight / min_snr_mean(gamma)
