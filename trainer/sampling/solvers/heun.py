"""Heun's method: an Euler step, then again with the mean of the velocities at both ends.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364, algorithm 1 without its added noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.sampling.schedule import full_range_schedule


class Heun:
    """Second order, two evaluations a step; the step to sigma 0 is Euler's.

    N steps take 2·N - 1 evaluations: sigmas[0], then every further sigma twice, for the correction
    of the step that led there and for the next step.
    """

    evaluations = 2
    schedule = staticmethod(full_range_schedule)

    def __init__(self, sigmas: Tensor, _generator: torch.Generator | None = None) -> None:
        self._sigmas: list[float] = sigmas.double().tolist()
        self._start: tuple[Tensor, Tensor] | None = None

    def step(self, index: int, noisy_BCFHW: Tensor, velocity_BCFHW: Tensor) -> Tensor:
        """Return the latents at the next sigma of the list; see `Solver.step`."""
        velocity = velocity_BCFHW.to(noisy_BCFHW.dtype)
        if self._start is None:
            self._start = noisy_BCFHW, velocity
            return noisy_BCFHW + (self._sigmas[index + 1] - self._sigmas[index]) * velocity
        before, first_velocity = self._start
        self._start = None
        change = self._sigmas[index] - self._sigmas[index - 1]
        return before + change * 0.5 * (first_velocity + velocity)
