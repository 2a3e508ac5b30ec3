"""Quantiles that are spread evenly: each part once, the same everywhere, uniform in themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.buckets import Bucket
from trainer.data.items import TrainingItem
from trainer.data.order import BatchOrder
from trainer.data.strata import quantile_at


def items(num: int, batch_size: int = 1, repeats: int = 1) -> list[TrainingItem]:
    first = TrainingItem(
        key="",
        name="",
        source=0,
        clip="",
        start=0,
        bucket=Bucket(64, 32, 5),
        latents=Path("x"),
        latents_key="k",
        context=Path("y"),
        context_key="c",
        num_repeats=repeats,
        batch_size=batch_size,
    )
    return [
        replace(first, key=f"clip{n}", bucket=Bucket(64, 32, 5 if n % 3 else 9)) for n in range(num)
    ]


@given(st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 70))
def test_a_group_meets_each_part_once(seed: int, group: int, size: int) -> None:
    found = [quantile_at(seed, group * size + member, size) for member in range(size)]
    assert sorted(int(value * size) for value in found) == list(range(size))
    assert all(0 <= value < 1 for value in found)


@given(st.integers(0, 2**40), st.integers(0, 4))
def test_items_that_follow_each_other_are_far_apart(seed: int, start: int) -> None:
    # Any four in a row of a group of 64 are in different quarters if they start at a multiple of 4.
    found = [quantile_at(seed, 4 * start + n, 64) for n in range(4)]
    turned = sorted(int(((value - found[0]) % 1) * 64 + 0.5) % 64 for value in found)
    assert all(abs(place - 16 * n) <= 1 for n, place in enumerate(turned))


@pytest.mark.parametrize("size", [2, 7, 64])
def test_each_place_is_uniform_over_seeds(size: int) -> None:
    num = 3000
    for place in (0, 1, size + 1):
        found = sorted(quantile_at(seed, place, size) for seed in range(num))
        gap = max(max((i + 1) / num - value, value - i / num) for i, value in enumerate(found))
        assert gap < 1.95 / math.sqrt(num)


def test_sums_over_a_group_vary_less_than_independent_draws() -> None:
    def spread(size: int | None) -> float:
        means = []
        for group in range(400):
            places = range(group * 16, group * 16 + 16)
            # Groups of one part each are independent.
            values = [quantile_at(5, place, size or 1) for place in places]
            means.append(sum(value**2 for value in values) / 16)
        return pvariance(means)

    independent = spread(None)
    assert independent == pytest.approx((1 / 5 - 1 / 9) / 16, rel=0.3)  # Var(u²) / 16
    assert spread(4) < independent / 5
    assert spread(16) < independent / 50


@pytest.mark.parametrize("buckets", ["epoch", 4])
def test_the_order_gives_them_out_by_place(buckets: int | str) -> None:
    dataset = items(11, batch_size=2, repeats=2)
    order = BatchOrder(dataset, 3, num_timestep_buckets=buckets)
    per_epoch = order.batches_per_epoch
    draws = [draw for position in range(3 * per_epoch) for draw in order.batch(position)]
    size = 22 if buckets == "epoch" else 4
    assert [draw.quantile for draw in draws] == [quantile_at(3, n, size) for n in range(66)]
    # From the middle, on another instance: as on another rank, or after a restart.
    again = BatchOrder(list(reversed(dataset)), 3, num_timestep_buckets=buckets)
    assert again.batch(2 * per_epoch + 1) == order.batch(2 * per_epoch + 1)
    plain = BatchOrder(dataset, 3)
    assert [replace(draw, quantile=None) for draw in order.batch(1)] == list(plain.batch(1))
