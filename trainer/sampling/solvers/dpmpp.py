"""DPM-Solver++(2M): one evaluation a step, second order through the clean estimate before.

Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
arXiv:2211.01095, algorithm 2, with alpha = 1 - sigma; the Wan repositories' `dpm++`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.sampling.schedule import full_range_cut_schedule


class DPMpp2M:
    """Second order; first order for the first step and the last one."""

    evaluations = 1
    schedule = staticmethod(full_range_cut_schedule)

    def __init__(self, sigmas: Tensor, _generator: torch.Generator | None = None) -> None:
        self._sigmas: list[float] = sigmas.double().tolist()
        self._log_snr = [_log_snr(sigma) for sigma in self._sigmas]
        self._older_clean: Tensor | None = None

    def step(self, index: int, noisy_BCFHW: Tensor, velocity_BCFHW: Tensor) -> Tensor:
        """Return the latents at the next sigma; see `Solver.step`."""
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        clean = noisy_BCFHW - sigma * velocity_BCFHW.to(noisy_BCFHW.dtype)
        h = self._log_snr[index + 1] - self._log_snr[index]
        weight = -(1 - following) * math.expm1(-h)
        result = (following / sigma) * noisy_BCFHW + weight * clean
        older, self._older_clean = self._older_clean, clean
        # The last h is infinite; after a start at sigma 1, so is the h before: no slope then.
        if older is not None and math.isfinite(h):
            ratio = (self._log_snr[index] - self._log_snr[index - 1]) / h
            result = result + (0.5 * weight / ratio) * (clean - older)
        return result


def _log_snr(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)
