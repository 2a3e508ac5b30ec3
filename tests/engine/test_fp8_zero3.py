"""fp8 weights under ZeRO-3: sharded as bytes, and trained on as where each process has all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.fp8_ranks import ROWS, base_of, held_bytes
from tests.warm import start as warm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("fp8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = warm.run(
        [sys.executable, "-m", "tests.engine.fp8_ranks", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ROWS)
def test_sharded_weights_train_as_whole_ones(ranks, name):
    folder, seen = ranks
    for rank in seen:
        whole, sharded = rank[f"{name}1"], rank[f"{name}3"]
        np.testing.assert_allclose(sharded["curve"], whole["curve"], rtol=1e-5)
    before, after = (
        torch.load(folder / f"{name}{stage}.pt", weights_only=True) for stage in (1, 3)
    )
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_each_process_holds_half_of_the_numbers(ranks, name):
    _, seen = ranks
    every = held_bytes(base_of(ROWS[name], 1))
    for rank in seen:
        assert rank[f"{name}1"]["held"] == every
        assert every / 2 <= rank[f"{name}3"]["held"] < 0.51 * every  # not one of them is gathered


def test_a_resumed_run_goes_on_to_the_bit(ranks):
    for rank in ranks[1]:
        assert rank["scaled3"]["resumed"] == rank["scaled3"]["curve"][1:]


def test_sharded_weights_validate_and_sample_as_whole_ones(ranks):
    for rank in ranks[1]:
        whole, sharded = rank["scaled1"], rank["scaled3"]
        assert sharded["validation"] == pytest.approx(whole["validation"], rel=1e-5)
        np.testing.assert_allclose(sharded["sample"], whole["sample"], rtol=1e-3, atol=1e-4)


def test_offloaded_weights_train_the_same(ranks):
    for rank in ranks[1]:
        assert rank["offloaded"]["curve"] == rank["scaled3"]["curve"]
