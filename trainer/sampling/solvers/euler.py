"""Euler's method: one straight step along the velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.sampling.schedule import full_range_schedule


class Euler:
    """First order, no memory: x + (sigma' - sigma)·velocity."""

    evaluations = 1
    schedule = staticmethod(full_range_schedule)

    def __init__(self, sigmas: Tensor, _generator: torch.Generator | None = None) -> None:
        self._sigmas: list[float] = sigmas.double().tolist()

    def step(self, index: int, noisy_BCFHW: Tensor, velocity_BCFHW: Tensor) -> Tensor:
        """Return the latents at the next sigma; see `Solver.step`."""
        change = self._sigmas[index + 1] - self._sigmas[index]
        return noisy_BCFHW + change * velocity_BCFHW.to(noisy_BCFHW.dtype)
