"""Absolute error: every deviation pulls alike, so outliers do not lead."""

from __future__ import annotations

from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class L1:
    """|prediction - target| of every element, in float32."""

    class Config(Options):
        """Options of `objective.loss = "l1"`: none."""

    def __init__(self, config: L1.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, prediction: Tensor, target: Tensor, sigma_B: Tensor) -> Tensor:
        """Return the absolute error, same shape as prediction and target."""
        return (prediction.float() - target.float()).abs()
