"""Huber's loss: squared error up to a size, absolute error beyond (Huber, 1964).

Twice torch's `huber_loss`, so that it is the squared error for small deviations and for a large δ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.core.seams import BuildContext
from trainer.losses.delta import HuberOptions, delta_at, per_sample


class Huber:
    """d² where |d| ≤ δ, else 2·δ·|d| - δ², with d = prediction - target."""

    class Config(HuberOptions):
        """Options of `objective.loss = "huber"`."""

    def __init__(self, config: Huber.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, prediction: Tensor, target: Tensor, sigma_B: Tensor) -> Tensor:
        """Return the loss of every element, float32."""
        size = (prediction.float() - target.float()).abs()
        delta = per_sample(delta_at(self.config, sigma_B), size)
        # With c = min(|d|, δ) both branches are c·(2·|d| - c).
        inner = torch.minimum(size, delta)
        return inner * (2 * size - inner)
