"""1 / σ², which makes nearly clean latents count most (diffusers' and musubi-tuner's `sigma_sqrt`).

In diffusers' training of Stable Diffusion 3 it weighs the error of the clean estimate, σ·(v̂ - v),
so that it gives the plain velocity loss back. Upon the velocity loss, as musubi-tuner has it, it
grows without limit towards clean latents: the floor sets the limit here.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trainer.contract.loss_weights import inverse_square_mean
from trainer.contract.options import Options
from trainer.core.seams import BuildContext


class SigmaSqrt:
    """w(σ) = max(σ, f)⁻² / (2/f - 1): mean 1 over σ in [0, 1]."""

    class Config(Options):
        """Options of `objective.weighting = "sigma_sqrt"`."""

        sigma_floor: float = Field(0.1, gt=0, le=1)
        """f: smaller sigmas weigh as much as this one."""

    def __init__(self, config: SigmaSqrt.Config, build: BuildContext) -> None:
        self.config = config

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Return one weight per sample."""
        floor = self.config.sigma_floor
        return sigma_B.clamp(min=floor) ** -2 / inverse_square_mean(floor)
