"""Distributions of sigma on [0, 1]: what share of draws is above a value, and the other way round.

Each timestep sampler is one of these. Plain numbers, no torch, so that shares of experts, checks
and `menma timesteps` know exactly what training draws. 0 is clean data, 1 is noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()
_HALVINGS = 48
"""A sigma to 4e-15; training has 24 bits of it."""


class SigmaDistribution(ABC):
    """A continuous distribution on [0, 1]."""

    @abstractmethod
    def above(self, sigma: float) -> float:
        """Return P(draw ≥ sigma); 1 at 0 and 0 at 1."""

    @abstractmethod
    def density(self, sigma: float) -> float:
        """Return the density at a sigma in (0, 1)."""

    def quantile(self, share: float) -> float:
        """Return the sigma that a share of all draws is below, for a share in [0, 1]."""
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if 1 - self.above(middle) < share:
                low = middle
            else:
                high = middle
        return (low + high) / 2


@dataclass(frozen=True, slots=True)
class UniformSigma(SigmaDistribution):
    """Flat."""

    def above(self, sigma: float) -> float:
        """Return 1 - σ."""
        return 1 - sigma

    def density(self, sigma: float) -> float:
        """Return 1."""
        return 1.0

    def quantile(self, share: float) -> float:
        """Return the share."""
        return share


@dataclass(frozen=True, slots=True)
class LogitNormalSigma(SigmaDistribution):
    """logit σ ~ N(mean, std²).

    A flow shift s moves σ to s·σ / (1 + (s - 1)·σ), which adds ln s to the logit: so the shifted
    distribution is one of these, too.
    """

    mean: float
    std: float

    def above(self, sigma: float) -> float:
        """Return Φ((mean - logit σ) / std)."""
        if sigma <= 0 or sigma >= 1:
            return 1.0 if sigma <= 0 else 0.0
        return _NORMAL.cdf((self.mean - _logit(sigma)) / self.std)

    def density(self, sigma: float) -> float:
        """Return φ((logit σ - mean) / std) / (std·σ·(1 - σ))."""
        if sigma <= 0 or sigma >= 1:
            return 0.0
        place = (_logit(sigma) - self.mean) / self.std
        return _NORMAL.pdf(place) / (self.std * sigma * (1 - sigma))

    def quantile(self, share: float) -> float:
        """Return sigmoid(mean + std·Φ⁻¹(share))."""
        if share <= 0 or share >= 1:
            return 0.0 if share <= 0 else 1.0
        return _sigmoid(self.mean + self.std * _NORMAL.inv_cdf(share))


@dataclass(frozen=True, slots=True)
class MixtureSigma(SigmaDistribution):
    """One of several distributions, each with its share of the draws."""

    parts: tuple[tuple[float, SigmaDistribution], ...]
    """Shares, which add up to 1, and distributions."""

    def above(self, sigma: float) -> float:
        """Return the parts' mean."""
        return sum(share * part.above(sigma) for share, part in self.parts)

    def density(self, sigma: float) -> float:
        """Return the parts' mean."""
        return sum(share * part.density(sigma) for share, part in self.parts)


@dataclass(frozen=True, slots=True)
class ModeSigma(SigmaDistribution):
    """σ = 1 - u - s·(cos²(πu/2) - 1 + u), u ~ U(0, 1), which falls from 1 to 0 as u grows."""

    scale: float
    """s, from -1 to 2 / (π - 2): the formula turns back beyond."""

    def quantile(self, share: float) -> float:
        """Return the formula at u = 1 - share."""
        return self._at(1 - share)

    def above(self, sigma: float) -> float:
        """Return the u at which the formula gives σ: all smaller ones give more."""
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self._at(middle) >= sigma:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def density(self, sigma: float) -> float:
        """Return -du/dσ; infinite where the formula is flat, at the ends of the range of s."""
        u = self.above(sigma)
        slope = 1 + self.scale * (1 - math.pi / 2 * math.sin(math.pi * u))
        return 1 / slope if slope > 0 else math.inf

    def _at(self, u: float) -> float:
        return 1 - u - self.scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)


@dataclass(frozen=True, slots=True)
class BellSigma(SigmaDistribution):
    """Density proportional to exp(-½((σ - center) / std)²): a normal cut off at 0 and 1."""

    center: float
    std: float

    def above(self, sigma: float) -> float:
        """Return the part of the cut normal that is above."""
        return (self._cdf(1.0) - self._cdf(sigma)) / self._inside

    def density(self, sigma: float) -> float:
        """Return the cut normal's density."""
        return NormalDist(self.center, self.std).pdf(sigma) / self._inside

    @property
    def _inside(self) -> float:
        return self._cdf(1.0) - self._cdf(0.0)

    def _cdf(self, sigma: float) -> float:
        return NormalDist(self.center, self.std).cdf(sigma)


@dataclass(frozen=True, slots=True)
class HalfBellSigma(SigmaDistribution):
    """Density proportional to exp(-½((σ - center) / std)²) below the center, to 1 above it."""

    center: float
    std: float

    def above(self, sigma: float) -> float:
        """Return the flat part above, and what of the bell is above."""
        flat = 1 - max(sigma, self.center)
        return (flat + self._bell(self.center) - self._bell(min(sigma, self.center))) / self._area

    def density(self, sigma: float) -> float:
        """Return the bell's height below the center, its peak above it."""
        place = min(sigma - self.center, 0.0) / self.std
        return math.exp(-0.5 * place * place) / self._area

    @property
    def _area(self) -> float:
        return 1 - self.center + self._bell(self.center) - self._bell(0.0)

    def _bell(self, sigma: float) -> float:
        """Return the area under the whole bell, whose peak is 1, up to σ."""
        return math.sqrt(2 * math.pi) * self.std * _NORMAL.cdf((sigma - self.center) / self.std)


@dataclass(frozen=True, slots=True)
class CubicSigma(SigmaDistribution):
    """σ = 1 - u³ towards noise, or u³ towards clean data; u ~ U(0, 1)."""

    towards_noise: bool

    def above(self, sigma: float) -> float:
        """Return ∛(1 - σ), or 1 - ∛σ."""
        inside = min(max(sigma, 0.0), 1.0)
        return math.cbrt(1 - inside) if self.towards_noise else 1 - math.cbrt(inside)

    def density(self, sigma: float) -> float:
        """Return ⅓·(1 - σ)^(-2/3), or ⅓·σ^(-2/3); infinite at the favoured end."""
        rest = 1 - sigma if self.towards_noise else sigma
        return math.cbrt(rest) ** -2 / 3 if rest > 0 else math.inf

    def quantile(self, share: float) -> float:
        """Return the formula, with u running the way that makes it grow."""
        return 1 - (1 - share) ** 3 if self.towards_noise else share**3


@dataclass(frozen=True, slots=True)
class SqueezedSigma(SigmaDistribution):
    """A whole distribution brought into a part of [0, 1]: low + (high - low)·σ."""

    base: SigmaDistribution
    low: float
    high: float

    def above(self, sigma: float) -> float:
        """Return what the base has above the place that moves to σ."""
        return self.base.above(self._before(sigma))

    def density(self, sigma: float) -> float:
        """Return the base's density, denser by the part's width; 0 outside."""
        if not self.low <= sigma <= self.high:
            return 0.0
        return self.base.density(self._before(sigma)) / (self.high - self.low)

    def quantile(self, share: float) -> float:
        """Return the base's, moved."""
        return self.low + (self.high - self.low) * self.base.quantile(share)

    def _before(self, sigma: float) -> float:
        return min(max((sigma - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class TruncatedSigma(SigmaDistribution):
    """Those draws of a distribution that are in a part of [0, 1]; its shape is kept."""

    base: SigmaDistribution
    low: float
    high: float

    @property
    def inside(self) -> float:
        """Share of the base's draws that are in the part."""
        return self.base.above(self.low) - self.base.above(self.high)

    def above(self, sigma: float) -> float:
        """Return the share of those inside."""
        place = min(max(sigma, self.low), self.high)
        return (self.base.above(place) - self.base.above(self.high)) / self.inside

    def density(self, sigma: float) -> float:
        """Return the base's density over the share inside; 0 outside."""
        if not self.low <= sigma <= self.high:
            return 0.0
        return self.base.density(sigma) / self.inside

    def quantile(self, share: float) -> float:
        """Return the base's quantile of what is below, and the share of what is inside."""
        below = 1 - self.base.above(self.low)
        found = self.base.quantile(below + share * self.inside)
        return min(max(found, self.low), self.high)


def _logit(sigma: float) -> float:
    return math.log(sigma) - math.log1p(-sigma)


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))
