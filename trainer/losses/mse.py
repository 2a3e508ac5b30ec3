"""Squared error, the loss Wan was trained with."""

from __future__ import annotations

from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class MSE:
    """(prediction - target)² of every element, in float32."""

    class Config(Options):
        """Options of `objective.loss = "mse"`: none."""

    def __init__(self, config: MSE.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, prediction: Tensor, target: Tensor, sigma_B: Tensor) -> Tensor:
        """Return the squared error, same shape as prediction and target."""
        return (prediction.float() - target.float()).square()
