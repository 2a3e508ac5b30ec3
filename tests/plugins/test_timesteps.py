"""Every timestep sampler against its density, written down independently in float64.

Draws are compared with distribution functions by Kolmogorov and Smirnov's largest gap. Where a
density has no closed integral, it is integrated here by the midpoint rule.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.contract.catalog import TIMESTEP_SAMPLERS
from trainer.contract.sigma_distributions import SigmaDistribution
from trainer.contract.timestep_mass import within
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext, TimestepSampler
from trainer.training.step import SigmaRange

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=10
)
NUM = 4000
TOKENS = 1560
"""Of a latent frame of 832x480: (832 / 16)·(480 / 16)."""
CDF = Callable[[float], float]


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def unshift(p: float, s: float) -> float:
    return p / (s - (s - 1) * p)


def shifted(s: float, scale: float = 1.0) -> CDF:
    return lambda p: normal_cdf(logit(unshift(p, s)) / scale)


def logsnr(mean: float, std: float) -> CDF:
    # P(σ ≤ p) = P(λ ≥ ln SNR(p)), SNR(p) = ((1 - p) / p)²
    return lambda p: 1 - normal_cdf((math.log(((1 - p) / p) ** 2) - mean) / std)


def mixture(*parts: tuple[float, CDF]) -> CDF:
    return lambda p: sum(share * cdf(p) for share, cdf in parts)


def integrated(density: Callable[[float], float], cells: int = 10_000) -> CDF:
    """Return the distribution function of an unnormalised density on [0, 1]."""
    sums = [0.0]
    for cell in range(cells):
        sums.append(sums[-1] + density((cell + 0.5) / cells))

    def cdf(p: float) -> float:
        cell = min(int(p * cells), cells - 1)
        part = p * cells - cell
        return (sums[cell] * (1 - part) + sums[cell + 1] * part) / sums[-1]

    return cdf


def mode_cdf(scale: float) -> CDF:
    """By the places of a grid of u: P(f(u) ≤ p), f from the paper's equation 20."""
    cells = 20_000
    values = sorted(
        1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        for u in (cell / cells for cell in range(cells + 1))
    )

    def cdf(p: float) -> float:
        place = min(max(bisect_right(values, p), 1), cells)
        low, high = values[place - 1], values[place]
        return (place - 1 + (p - low) / (high - low)) / cells

    return cdf


def bell(center: float, std: float, *, flat: bool = False) -> CDF:
    def density(p: float) -> float:
        return 1.0 if flat and p > center else math.exp(-((p - center) ** 2) / (2 * std**2))

    return integrated(density)


# e^μ by hand: 0.5 + 0.65·(1560 - 256) / 3840 = 0.72073; 0.5 + 0.4·(1560 - 256) / 7936 = 0.56573.
FLUX, QWEN = math.exp(0.7207291667), math.exp(0.5657258065)
STYLE, CLEAN = logsnr(-6, 2), logsnr(5.36, 1)
CASES: list[tuple[str, dict[str, Any], CDF]] = [
    ("uniform", {}, lambda p: p),
    ("sigmoid", {}, lambda p: normal_cdf(logit(p))),
    ("sigmoid", {"sigmoid_scale": 2.0}, lambda p: normal_cdf(logit(p) / 2)),
    ("shift", {"flow_shift": 5.0}, shifted(5.0)),
    ("shift", {"flow_shift": 3.0, "sigmoid_scale": 0.5}, shifted(3.0, 0.5)),
    ("logit_normal", {"logit_mean": -1.0, "logit_std": 1.5},
     lambda p: normal_cdf((logit(p) + 1) / 1.5)),
    ("logit_normal", {"logit_mean": 0.5, "flow_shift": 2.0},
     lambda p: normal_cdf(logit(unshift(p, 2.0)) - 0.5)),
    ("flux_shift", {}, shifted(FLUX)),
    ("flux_shift", {"sigmoid_scale": 0.7}, shifted(FLUX, 0.7)),
    ("qwen_shift", {}, shifted(QWEN)),
    ("qwen_shift", {"sigmoid_scale": 1.4}, shifted(QWEN, 1.4)),
    ("logsnr", {}, STYLE),
    ("logsnr", {"logsnr_mean": 1.0, "logsnr_std": 0.5}, logsnr(1, 0.5)),
    ("qinglong_flux", {}, mixture((0.79, shifted(FLUX)), (0.11, STYLE), (0.10, CLEAN))),
    ("qinglong_flux", {"noisy_share": 0.5, "clean_share": 0.25, "logsnr_mean": -2.0,
                       "logsnr_std": 1.0, "sigmoid_scale": 0.5},
     mixture((0.25, shifted(FLUX, 0.5)), (0.5, logsnr(-2, 1)), (0.25, CLEAN))),
    ("qinglong_qwen", {}, mixture((0.95, shifted(QWEN)), (0.05, CLEAN))),
    ("qinglong_qwen", {"noisy_share": 0.3, "clean_share": 0.0, "logsnr_mean": -1.0,
                       "logsnr_std": 3.0, "sigmoid_scale": 2.0},
     mixture((0.7, shifted(QWEN, 2.0)), (0.3, logsnr(-1, 3)))),
    ("mode", {}, mode_cdf(1.29)),
    ("mode", {"mode_scale": -0.8}, mode_cdf(-0.8)),
    ("bell", {}, bell(0.5, 0.2)),
    ("bell", {"bell_center": 0.9, "bell_std": 0.3}, bell(0.9, 0.3)),
    ("half_bell", {}, bell(0.5, 0.2, flat=True)),
    ("half_bell", {"bell_center": 0.7, "bell_std": 0.1}, bell(0.7, 0.1, flat=True)),
    ("content", {}, lambda p: 1 - (1 - p) ** (1 / 3)),
    ("style", {}, lambda p: p ** (1 / 3)),
]  # fmt: skip
IDS = [f"{name} {options}" for name, options, _ in CASES]


def make(name: str, options: dict[str, Any]) -> TimestepSampler:
    implementation: Any = TIMESTEP_SAMPLERS.load(name)
    return implementation(implementation.Config(**options), BUILD)


def assert_follows(draws: torch.Tensor, cdf: CDF) -> None:
    """Compare draws with a distribution by the largest gap between the two functions.

    The limit is the 0.1 % quantile, so that a wrong formula fails and a right one does not.
    """
    points = sorted(min(max(value, 1e-7), 1 - 1e-7) for value in draws.double().tolist())
    num = len(points)
    gap = max(
        max((i + 1) / num - cdf(point), cdf(point) - i / num) for i, point in enumerate(points)
    )
    assert gap < 1.95 / math.sqrt(num)


@pytest.mark.parametrize(("name", "options", "cdf"), CASES, ids=IDS)
def test_draws_follow_the_distribution(name: str, options: dict[str, Any], cdf: CDF) -> None:
    draws = make(name, options).sample(NUM, torch.Generator().manual_seed(1), TOKENS)
    assert draws.shape == (NUM,)
    assert draws.dtype == torch.float32
    assert_follows(draws, cdf)


@pytest.mark.parametrize(("name", "options", "cdf"), CASES, ids=IDS)
def test_the_distribution_without_torch_is_the_same(
    name: str, options: dict[str, Any], cdf: CDF
) -> None:
    found = make(name, options).distribution(TOKENS)
    assert (found.above(0.0), found.above(1.0)) == pytest.approx((1.0, 0.0), abs=1e-9)
    for sigma in (0.01, 0.2, 0.5, 0.71, 0.875, 0.99):
        # Sums over cells and counts of a grid are exact to 1e-4.
        assert found.above(sigma) == pytest.approx(1 - cdf(sigma), abs=1e-4)
        if 1e-6 < found.above(sigma) < 1 - 1e-6:  # else next to nothing is on one side
            assert found.quantile(1 - found.above(sigma)) == pytest.approx(sigma, abs=1e-8)
        width = 1e-4
        slope = (cdf(sigma + width) - cdf(sigma - width)) / (2 * width)
        assert found.density(sigma) == pytest.approx(slope, rel=2e-2, abs=1e-2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.875), (0.9, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize(("name", "options", "cdf"), CASES[3::4], ids=IDS[3::4])
def test_ranges_squeeze_the_distribution_or_keep_its_shape(
    name: str, options: dict[str, Any], cdf: CDF, low: float, high: float
) -> None:
    sampler = make(name, options)
    below, inside = cdf(low) if low else 0.0, (cdf(high) if high < 1 else 1.0)
    inside -= below

    def truncated(p: float) -> float:
        return (cdf(p) - below) / inside

    def squeezed(p: float) -> float:
        return cdf(min(max((p - low) / (high - low), 1e-7), 1 - 1e-7))

    for preserve, expected in ((True, truncated), (False, squeezed)):
        random = torch.Generator().manual_seed(2)
        sigmas = SigmaRange(low=low, high=high, preserve_shape=preserve)
        draws = torch.stack([sigmas.draw(sampler, random, TOKENS) for _ in range(700)])
        assert draws.dtype == torch.float32
        assert low - 1e-6 <= draws.min()
        assert draws.max() <= high + 1e-6
        assert_follows(draws, expected)
        part = within(sampler.distribution(TOKENS), low, high, preserve_shape=preserve)
        middle = low + 0.6 * (high - low)
        assert part.above(middle) == pytest.approx(1 - expected(middle), abs=5e-4)
        assert part.density(middle) == pytest.approx(
            (expected(middle + 1e-4) - expected(middle - 1e-4)) / 2e-4, rel=3e-2, abs=2e-2
        )
        assert part.density(low / 2 - 0.1) == part.density((1 + high) / 2 + 0.1) == 0


def test_the_shift_by_size_goes_by_the_tokens_of_one_frame() -> None:
    # Figures of features: 832x480 has s = 2.056, 1280x720 (3600 tokens) 2.904.
    for tokens, shift in ((1560, 2.056), (3600, 2.904), (256, math.exp(0.5))):
        median = make("flux_shift", {}).distribution(tokens).quantile(0.5)
        assert median / (1 - median) == pytest.approx(shift, abs=5e-4)
    assert make("qwen_shift", {}).distribution(8192).quantile(0.5) == pytest.approx(
        1 / (1 + math.exp(-0.9))
    )


def test_ends_of_distributions() -> None:
    ends: dict[str, SigmaDistribution] = {
        name: make(name, {}).distribution(TOKENS) for name in TIMESTEP_SAMPLERS.names
    }
    for name, found in ends.items():
        assert found.quantile(0.0) == pytest.approx(0.0, abs=1e-6), name
        assert found.quantile(1.0) > 0.999, name
    assert math.isinf(ends["content"].density(1.0))
    assert math.isinf(ends["style"].density(0.0))


def test_every_sampler_is_tested_and_stays_in_range() -> None:
    assert {name for name, _, _ in CASES} == set(TIMESTEP_SAMPLERS.names)
    for name in TIMESTEP_SAMPLERS.names:
        sampler = make(name, {})
        first = sampler.sample(1000, torch.Generator().manual_seed(3), TOKENS)
        again = sampler.sample(1000, torch.Generator().manual_seed(3), TOKENS)
        assert torch.equal(first, again)
        assert first.min() >= 0
        assert first.max() <= 1


def test_every_option_of_a_sampler_is_varied() -> None:
    varied = {name: set[str]() for name in TIMESTEP_SAMPLERS.names}
    for name, options, _ in CASES:
        varied[name] |= options.keys()
    for name in TIMESTEP_SAMPLERS.names:
        implementation: Any = TIMESTEP_SAMPLERS.load(name)
        assert varied[name] == implementation.Config.model_fields.keys()
