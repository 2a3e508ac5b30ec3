"""How much each file counts in an average of the files of one run.

avg ← w₁; for i = 2…n: avg ← βᵢ·avg + (1 − βᵢ)·wᵢ. Files count from 1, so the second has t = 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.contract.errors import ConfigError

LARGEST_SIGMA_REL = 1 / math.sqrt(12)
"""Width at exponent γ = 0, an average in which all of training counts alike."""


def constant_betas(count: int, beta: float) -> list[float]:
    """Return β₂…βₙ, all equal."""
    return [beta] * (count - 1)


def linear_betas(count: int, beta: float, beta2: float) -> list[float]:
    """Return β₂…βₙ in equal steps from `beta` to `beta2`; of two files the one β is `beta`."""
    steps = max(count - 2, 1)
    return [beta + (beta2 - beta) * index / steps for index in range(count - 1)]


def power_betas(count: int, sigma_rel: float) -> list[float]:
    """Return βₜ = (1 − 1/t)^(γ + 1), t = 2…n: the power function of Karras et al.

    arXiv:2312.02696, equation 2. It does not depend on the steps between files, which must be
    equal.
    """
    exponent = power_exponent(sigma_rel)
    return [(1 - 1 / number) ** (exponent + 1) for number in range(2, count + 1)]


def power_exponent(sigma_rel: float) -> float:
    """Return γ ≥ 0 with σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), by bisection.

    Raises:
        ConfigError: outside (0, 1/√12], where there is no such γ.
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL + 1e-12:
        raise ConfigError(
            f"sigma_rel is {sigma_rel:g}, and no average is that wide",
            hint=f"at most 1/√12 = {LARGEST_SIGMA_REL:.4f}, where all files count alike; try 0.2",
        )

    def width(exponent: float) -> float:
        return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))

    low, high = 0.0, 1.0
    while width(high) > sigma_rel:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def file_weights(betas: Sequence[float]) -> list[float]:
    """Return what each of the n files counts, given β₂…βₙ; they sum to 1."""
    weights = [1.0]
    for beta in betas:
        weights = [weight * beta for weight in weights] + [1 - beta]
    return weights
