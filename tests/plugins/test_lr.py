from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer.contract.catalog import LR_SCHEDULES
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.training.lr import LearningRate

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=10
)


def rates(kind: str, total: int, warmup: int, **options: Any) -> list[float]:
    implementation: Any = LR_SCHEDULES.load(kind)
    schedule = implementation(implementation.Config(**options), BUILD)
    rate = LearningRate(base=2.0, warmup_steps=warmup, total_steps=total, schedule=schedule)
    return [rate(step) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_full_rate() -> None:
    assert rates("constant", 6, 4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_ends_at_the_smallest_rate() -> None:
    assert rates("linear", 5, 0) == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert rates("linear", 6, 1, min_lr_ratio=0.5)[-1] == 1.0


def test_cosine_equals_torch() -> None:
    total = 9
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - 1)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates("cosine", total, 0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", LR_SCHEDULES.names)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9), (50, 3)])
def test_rates_are_finite_and_bounded(kind: str, total: int, warmup: int) -> None:
    values = rates(kind, total, warmup)
    assert len(values) == total
    assert all(math.isfinite(value) and 0 <= value <= 2 for value in values)
