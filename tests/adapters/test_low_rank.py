"""Sums and truncations against whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.adapters import low_rank
from trainer.adapters.base import LoRAFactors
from trainer.adapters.low_rank import Cut, factorise, truncate, weighted_sum

from .lora_tool_runs import best_approximation


def factors(outputs=7, inputs=5, rank=3, alpha=3.0, seed=0) -> LoRAFactors:
    stream = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=stream)
    return LoRAFactors(down, torch.randn(outputs, rank, generator=stream), alpha)


def exact(pair: LoRAFactors) -> torch.Tensor:
    return pair.alpha / pair.rank * pair.up_OR.double() @ pair.down_RI.double()


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.floats(-3, 3), st.floats(0.25, 8)), min_size=1, max_size=4
    )
)
def test_a_sum_of_factors_is_the_sum_of_the_updates(parts):
    pairs = [(factors(rank=r, alpha=a, seed=i), w) for i, (r, w, a) in enumerate(parts)]
    if not any(weight for _, weight in pairs):
        with pytest.raises(ValueError, match="nothing"):
            weighted_sum(pairs)
        return
    total = weighted_sum(pairs)
    wanted = sum(weight * exact(pair) for pair, weight in pairs)
    torch.testing.assert_close(exact(total), wanted, rtol=1e-5, atol=1e-5)
    assert total.rank == sum(pair.rank for pair, weight in pairs if weight)


def test_equal_strengths_leave_the_factors_untouched():
    one, two = factors(rank=2, alpha=1.0), factors(rank=4, alpha=2.0, seed=1)
    one = LoRAFactors(one.down_RI.bfloat16(), one.up_OR.bfloat16(), one.alpha)
    two = LoRAFactors(two.down_RI.bfloat16(), two.up_OR.bfloat16(), two.alpha)
    total = weighted_sum([(one, 0.3), (two, 0.3)])
    assert total.down_RI.dtype == torch.bfloat16
    assert torch.equal(total.up_OR, torch.cat([one.up_OR, two.up_OR], 1))
    assert total.scale == pytest.approx(0.15)
    alone = weighted_sum([(one, -2.0)])
    assert alone.down_RI is one.down_RI
    assert alone.alpha == -2.0


@pytest.mark.parametrize("alpha", [6.0, -1.5])
@pytest.mark.parametrize(("outputs", "inputs"), [(9, 6), (4, 12)])
@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_truncation_is_the_best_approximation(alpha, outputs, inputs, rank):
    pair = factors(outputs, inputs, rank=5, alpha=alpha)
    result = truncate(pair, Cut(max_rank=rank))
    whole = exact(pair)
    wanted = best_approximation(whole, rank)
    torch.testing.assert_close(exact(result.factors), wanted, rtol=1e-5, atol=1e-5)
    energy = wanted.square().sum() / whole.square().sum()
    assert result.energy == pytest.approx(float(energy), rel=1e-6)
    assert result.total == pytest.approx(float(whole.square().sum()))
    assert result.factors.scale == pytest.approx(alpha / 5)
    torch.testing.assert_close(
        result.factors.up_OR.norm(dim=0), result.factors.down_RI.norm(dim=1), rtol=1e-4, atol=1e-6
    )


def test_a_zero_update_stays_one():
    pair = LoRAFactors(torch.randn(3, 5), torch.zeros(7, 3), 3.0)
    for result in (truncate(pair, Cut(energy=0.9)), factorise(pair.delta(), Cut(energy=0.9))):
        assert result.factors.rank == 1
        assert result.energy == 1.0
        assert not result.factors.delta().any()


SPECTRUM = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("cut", "rank"),
    [
        (Cut(), 4),
        (Cut(max_rank=2), 2),
        (Cut(max_rank=99), 4),
        (Cut(energy=16 / 21.25), 1),
        (Cut(energy=16.1 / 21.25), 2),
        (Cut(energy=1.0), 4),
        (Cut(ratio=4.0), 3),
        (Cut(ratio=1.0), 1),
        (Cut(ratio=4.0, max_rank=2), 2),
        (Cut(energy=0.99, ratio=2.0), 2),
    ],
)
def test_the_tightest_limit_decides(cut, rank):
    assert cut.rank_of(SPECTRUM, 21.25) == rank


def decaying(outputs: int, inputs: int) -> torch.Tensor:
    stream = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(outputs, 60, generator=stream, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(inputs, 60, generator=stream, dtype=torch.float64)).Q
    return (left * 0.9 ** torch.arange(60, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("small", [1024, 16], ids=["whole", "randomised"])
@pytest.mark.parametrize(
    "cut", [Cut(max_rank=6), Cut(energy=0.98), Cut(ratio=5.0), Cut(energy=0.999, max_rank=40)]
)
def test_matrices_are_factorised_in_both_ways(monkeypatch, small, cut):
    monkeypatch.setattr(low_rank, "_SMALL", small)
    monkeypatch.setattr(low_rank, "_FIRST_RANK", 4)
    matrix = decaying(150, 110)
    values = torch.linalg.svdvals(matrix)
    total = float(values.square().sum())
    result = factorise(matrix.float(), cut)
    assert result.factors.rank == cut.rank_of(values, total)
    assert result.factors.scale == 1.0
    wanted = best_approximation(matrix, result.factors.rank)
    torch.testing.assert_close(exact(result.factors), wanted, rtol=1e-4, atol=1e-4)
    assert result.energy == pytest.approx(float(wanted.square().sum()) / total, rel=1e-4)
