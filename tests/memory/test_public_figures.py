"""The comparison in docs/estimate.md is the one that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from public_figures import (
    BOUNDS,
    FIGURES,
    MEASURED_SLOPE_GIB,
    Bound,
    bounds_table,
    slope_gib,
    table,
)

PAGE = Path(__file__).parents[2] / "docs" / "estimate.md"


def test_the_page_shows_these_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table() in text
    assert bounds_table() in text


def test_memory_grows_with_tokens_as_measured() -> None:
    assert slope_gib() == pytest.approx(MEASURED_SLOPE_GIB, rel=0.1)


def test_a_peak_with_hardly_any_weights_is_met() -> None:
    (row,) = [row for row in FIGURES if row.measured_gib == 4.73]
    assert abs(row.error) < 0.1


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.source)
def test_what_is_known_to_run_is_estimated_to_fit(bound: Bound) -> None:
    assert bound.estimated_gib < bound.card_gib
