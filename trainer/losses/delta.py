"""δ of the Huber losses over sigma (Khrapov et al., arXiv:2403.16728, section 4).

The schedules are those of the paper and of kohya-ss' sd-scripts, told by δ at both ends: δ₀ at σ =
0 and δ₁ at σ = 1. `snr` is sd-scripts' (1 - c) / (1 + √(1/SNR))² + c, and √(1/SNR) = σ / (1 - σ)
here.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options


class HuberOptions(Options):
    """Where a Huber loss goes over from squares to absolute values."""

    huber_delta: float = Field(1.0, gt=0)
    """δ: errors of the velocity that are much larger count by their size, not their square; with a
    schedule that at sigma 0."""
    huber_schedule: Literal["constant", "linear", "exponential", "snr"] = "constant"
    """How δ goes from `huber_delta` at sigma 0 to `huber_delta_noise` at sigma 1."""
    huber_delta_noise: float = Field(0.1, gt=0)
    """δ at sigma 1; for schedules other than `constant`."""


def delta_at(options: HuberOptions, sigma_B: Tensor) -> Tensor:
    """Return δ of each sample.

    constant: δ₀. linear: δ₀ + (δ₁ - δ₀)·σ. exponential: δ₀^(1 - σ)·δ₁^σ.
    snr: δ₁ + (δ₀ - δ₁)·(1 - σ)².
    """
    clean, noise = options.huber_delta, options.huber_delta_noise
    if options.huber_schedule == "linear":
        return clean + (noise - clean) * sigma_B
    if options.huber_schedule == "exponential":
        return clean * torch.pow(noise / clean, sigma_B)
    if options.huber_schedule == "snr":
        return noise + (clean - noise) * (1 - sigma_B).square()
    return torch.full_like(sigma_B, clean)


def per_sample(value_B: Tensor, like: Tensor) -> Tensor:
    """Return one value a sample in a shape that broadcasts to `like`, (B, …)."""
    return value_B.view(-1, *([1] * (like.dim() - 1)))
