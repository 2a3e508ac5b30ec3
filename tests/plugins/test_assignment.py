"""The linear assignment against every permutation, and one that is known to be the best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.core.assignment import assign


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("more", [0, 1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_no_permutation_costs_less(rows: int, more: int, ties: bool) -> None:
    random = np.random.default_rng(rows)
    columns = rows + more
    for _ in range(20):
        costs = random.normal(size=(rows, columns))
        if ties:
            costs = random.integers(-2, 3, size=(rows, columns)).astype(float)
        chosen = assign(costs)
        assert len(set(chosen)) == rows
        least = min(
            costs[range(rows), other].sum()
            for other in itertools.permutations(range(columns), rows)
        )
        assert costs[range(rows), chosen].sum() == pytest.approx(least, abs=1e-9)


def test_a_permutation_that_is_the_best_by_construction_is_found() -> None:
    """Costs u_i + v_j + what is 0 for the permutation alone: no other one costs as little."""
    random = np.random.default_rng(1)
    size = 60
    best = random.permutation(size)
    extra = random.uniform(0.1, 1, size=(size, size))
    extra[np.arange(size), best] = 0
    costs = random.normal(size=(size, 1)) + random.normal(size=size) + extra
    assert assign(costs) == best.tolist()


def test_more_rows_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        assign(np.zeros((3, 2)))
