"""Every timestep sampler against its density, written down independently in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.contract.catalog import TIMESTEP_SAMPLERS
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=10
)
NUM = 20_000


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def unshift(p: float, s: float) -> float:
    return p / (s - (s - 1) * p)


CASES: list[tuple[str, dict[str, Any], Callable[[float], float]]] = [
    ("uniform", {}, lambda p: p),
    ("sigmoid", {}, lambda p: normal_cdf(logit(p))),
    ("sigmoid", {"sigmoid_scale": 2.0}, lambda p: normal_cdf(logit(p) / 2)),
    ("shift", {"flow_shift": 5.0}, lambda p: normal_cdf(logit(unshift(p, 5.0)))),
    ("shift", {"flow_shift": 3.0, "sigmoid_scale": 0.5},
     lambda p: normal_cdf(logit(unshift(p, 3.0)) / 0.5)),
    ("logit_normal", {"logit_mean": -1.0, "logit_std": 1.5},
     lambda p: normal_cdf((logit(p) + 1) / 1.5)),
    ("logit_normal", {"logit_mean": 0.5, "flow_shift": 2.0},
     lambda p: normal_cdf(logit(unshift(p, 2.0)) - 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "cdf"), CASES)
def test_draws_follow_the_distribution(
    name: str, options: dict[str, Any], cdf: Callable[[float], float]
) -> None:
    implementation: Any = TIMESTEP_SAMPLERS.load(name)
    sampler = implementation(implementation.Config(**options), BUILD)
    draws = sampler.sample(NUM, torch.Generator().manual_seed(1))
    assert draws.shape == (NUM,)
    assert draws.dtype == torch.float32
    points = sorted(min(max(value, 1e-7), 1 - 1e-7) for value in draws.double().tolist())
    # Kolmogorov-Smirnov: the largest gap between the two distribution functions; the limit is
    # the 0.1 % quantile, so a wrong formula fails and a right one does not.
    gap = max(
        max((i + 1) / NUM - cdf(point), cdf(point) - i / NUM) for i, point in enumerate(points)
    )
    assert gap < 1.95 / math.sqrt(NUM)


def test_every_sampler_is_tested_and_stays_in_range() -> None:
    assert {name for name, _, _ in CASES} == set(TIMESTEP_SAMPLERS.names)
    for name in TIMESTEP_SAMPLERS.names:
        implementation: Any = TIMESTEP_SAMPLERS.load(name)
        sampler = implementation(implementation.Config(), BUILD)
        first = sampler.sample(1000, torch.Generator().manual_seed(3))
        again = sampler.sample(1000, torch.Generator().manual_seed(3))
        assert torch.equal(first, again)
        assert first.min() >= 0
        assert first.max() <= 1
