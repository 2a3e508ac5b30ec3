"""Pseudo-Huber loss, smooth everywhere (Khrapov et al., arXiv:2403.16728).

The paper's δ²·(√(1 + (d/δ)²) - 1), twice, so that it is the squared error for small deviations.
kohya-ss' sd-scripts have the same as 2·c·(√(d² + c²) - c); musubi-tuner's descendants leave the
factor out, which changes the size of the loss with δ.
"""

from __future__ import annotations

from torch import Tensor

from trainer.core.seams import BuildContext
from trainer.losses.delta import HuberOptions, delta_at, per_sample


class PseudoHuber:
    """2·δ·(√(d² + δ²) - δ), with d = prediction - target."""

    class Config(HuberOptions):
        """Options of `objective.loss = "pseudo_huber"`."""

    def __init__(self, config: PseudoHuber.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, prediction: Tensor, target: Tensor, sigma_B: Tensor) -> Tensor:
        """Return the loss of every element, float32."""
        square = (prediction.float() - target.float()).square()
        delta = per_sample(delta_at(self.config, sigma_B), square)
        # The same as above, without the difference of two nearly equal numbers.
        return 2 * delta * square / ((square + delta.square()).sqrt() + delta)
