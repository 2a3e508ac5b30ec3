"""Fixtures of the app's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from app_runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """Return a starter of runs; what still lives after the test is killed."""
    runs = Runs(tmp_path / "runs")
    yield runs
    runs.end_all()
