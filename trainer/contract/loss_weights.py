"""Weights of the base loss over sigma, without torch, for checks and pictures.

Each has a mean of 1 over sigma flat in [0, 1]: a weighting moves attention between noise levels and
leaves the size of the loss about where it was. The weightings in `trainer/weightings` compute the
same on tensors; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.plugin_options import all_options
from trainer.contract.sigma_distributions import BellSigma

Options = Mapping[str, Any]
Weight = Callable[[float], float]


def loss_weight(name: str, options: Options) -> Weight:
    """Return the weight of a sigma in [0, 1] that a weighting gives with these options."""
    return _MAKERS[name](options)


def weight_of(config: RunConfig) -> Weight:
    """Return the weight of a sigma in a config, options not given at their defaults."""
    section = config.objective
    options = all_options("weighting", section.weighting, section.options("weighting"))
    return loss_weight(section.weighting, options)


def inverse_square_mean(floor: float) -> float:
    """Return ∫ max(σ, floor)⁻² dσ over [0, 1]: 2 / floor - 1."""
    return 2 / floor - 1


def min_snr_mean(gamma: float) -> float:
    """Return ∫ min((1 - σ)², γ·σ²) dσ over [0, 1]; the two meet at σ = 1 / (1 + √γ)."""
    meeting = 1 / (1 + math.sqrt(gamma))
    return (gamma * meeting**3 + (1 - meeting) ** 3) / 3


def _sigma_sqrt(options: Options) -> Weight:
    floor = options["sigma_floor"]
    mean = inverse_square_mean(floor)
    return lambda sigma: max(sigma, floor) ** -2 / mean


def _cosmap(_options: Options) -> Weight:
    return lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma * sigma))


def _bell(options: Options) -> Weight:
    # A density on [0, 1] has the mean 1 there.
    return BellSigma(options["weighting_center"], options["weighting_std"]).density


def _min_snr(options: Options) -> Weight:
    gamma = options["min_snr_gamma"]
    mean = min_snr_mean(gamma)
    return lambda sigma: min((1 - sigma) ** 2, gamma * sigma * sigma) / mean


_MAKERS: dict[str, Callable[[Options], Weight]] = {
    "none": lambda _: lambda _: 1.0,
    "sigma_sqrt": _sigma_sqrt,
    "cosmap": _cosmap,
    "bell": _bell,
    "min_snr": _min_snr,
}
