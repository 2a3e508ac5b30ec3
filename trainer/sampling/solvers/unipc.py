"""UniPC of order two: predict, then correct with the velocity of the next step at no extra cost.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
arXiv:2302.04867, variant B2(h) = e^h - 1 on data prediction; what the Wan repositories sample with.
With alpha = 1 - sigma and lambda = log(alpha / sigma), the exact solution between two sigmas is

    x' = sigma'/sigma · x + alpha' · ∫ e^(lambda - lambda') · clean(lambda) dlambda

and the methods differ in the polynomial they put through the known clean estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.sampling.schedule import training_grid_schedule

_SECOND_ORDER = 2


@dataclass(frozen=True, slots=True)
class _Taken:
    """The step that led to the current sigma, kept for its correction."""

    order: int
    start_BCFHW: Tensor
    clean_BCFHW: Tensor
    older_clean_BCFHW: Tensor | None


class UniPC:
    """Second order, first order for the first and the last step; corrects all but the last."""

    evaluations = 1
    schedule = staticmethod(training_grid_schedule)

    def __init__(self, sigmas: Tensor, _generator: torch.Generator | None = None) -> None:
        self._sigmas: list[float] = sigmas.double().tolist()
        if self._sigmas[0] >= 1:
            raise ValueError("UniPC needs a first sigma below 1: its log-SNR must be finite")
        self._taken: _Taken | None = None

    def step(self, index: int, noisy_BCFHW: Tensor, velocity_BCFHW: Tensor) -> Tensor:
        """Return the latents at the next sigma; see `Solver.step`."""
        velocity = velocity_BCFHW.to(noisy_BCFHW.dtype)
        clean = noisy_BCFHW - self._sigmas[index] * velocity
        taken = self._taken
        start = noisy_BCFHW if taken is None else self._correct(index, taken, clean)
        older = None if taken is None else taken.clean_BCFHW
        last = index == len(self._sigmas) - 2
        order = 1 if older is None or last else _SECOND_ORDER
        self._taken = _Taken(order, start, clean, older)
        return self._predict(index, self._taken)

    def _predict(self, index: int, step: _Taken) -> Tensor:
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        h = self._log_snr(index + 1) - self._log_snr(index)
        weight = -(1 - following) * math.expm1(-h)
        result = (following / sigma) * step.start_BCFHW + weight * step.clean_BCFHW
        if step.order == _SECOND_ORDER and step.older_clean_BCFHW is not None:
            ratio = (self._log_snr(index - 1) - self._log_snr(index)) / h
            slope = (step.older_clean_BCFHW - step.clean_BCFHW) / ratio
            result = result + 0.5 * weight * slope
        return result

    def _correct(self, index: int, step: _Taken, clean_BCFHW: Tensor) -> Tensor:
        """Redo the step that ended at `index`, now knowing the clean estimate there."""
        before, sigma = self._sigmas[index - 1], self._sigmas[index]
        h = self._log_snr(index) - self._log_snr(index - 1)
        weight = -(1 - sigma) * math.expm1(-h)
        result = (sigma / before) * step.start_BCFHW + weight * step.clean_BCFHW
        difference = clean_BCFHW - step.clean_BCFHW
        if step.order == 1 or step.older_clean_BCFHW is None:
            return result + 0.5 * weight * difference
        # The order conditions of the paper (its eq. 5) for nodes at `ratio` and 1: a 2x2 system.
        ratio = (self._log_snr(index - 2) - self._log_snr(index - 1)) / h
        first, second = _moments(h)
        share_older = (second - first) / (ratio - 1)
        slope = (step.older_clean_BCFHW - step.clean_BCFHW) / ratio
        return result + weight * (share_older * slope + (first - share_older) * difference)

    def _log_snr(self, index: int) -> float:
        sigma = self._sigmas[index]
        return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def _moments(h: float) -> tuple[float, float]:
    """Return the integrals of the degree 1 and 2 terms over a step of log-SNR h, over B2(h)."""
    b2 = math.expm1(-h)
    phi_2 = b2 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    return phi_2 / b2, 2 * phi_3 / b2
