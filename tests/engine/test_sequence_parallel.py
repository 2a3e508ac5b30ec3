"""Processes that share clips (`distributed.sequence_parallel`): the same as one process alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.sequence_ranks import make_step, rows, train, validate
from tests.engine.toy import AdamWFactory
from tests.warm import start as warm
from trainer.engine.local import LocalEngine
from trainer.engine.process_group import World

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
RUNS = [(kind, stage) for kind in ("lora", "full") for stage in range(4)]


def results(case: str, num: int, size: int, folder: Path) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    arguments = (case, str(num), str(size), str(folder))
    done = warm.run(
        [sys.executable, "-m", "tests.engine.sequence_ranks", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num)]


@pytest.fixture(
    scope="module",
    params=[(2, 2), pytest.param((4, 4), marks=pytest.mark.long)],
    ids=["2 of 2", "4 of 4"],
)
def single(request, tmp_path_factory):
    return results("single", *request.param, tmp_path_factory.mktemp("single")), request.param[1]


def test_output_and_gradients_are_those_of_one_process(single):
    ranks, _ = single
    for name in rows(len(ranks)):
        for seen in ranks:
            assert seen[name]["size"] > 1, name
            assert seen[name]["output"] <= 1e-5, name
            assert seen[name]["gradients"] <= 1e-5, name
    for seen in ranks:
        assert len(seen["grad modes"]) == 3
        assert max(seen["grad modes"].values()) <= 1e-5


def test_the_comparison_notices_what_could_be_wrong(single):
    ranks, size = single
    for seen in ranks:
        assert seen["wrong"]["deaf"] > 0.1
        assert seen["wrong"]["apart"] == pytest.approx(1 - 1 / size, abs=0.01)


def one_process(kind: str, folder: Path, accumulation: int, state: Path | None = None):
    """Train on the microbatches of all groups, on one process that shares nothing."""
    step, trainable = make_step(kind, None)
    engine = LocalEngine(
        step,
        trainable,
        AdamWFactory(),
        device="cpu",
        max_grad_norm=0.5,
        gradient_accumulation_steps=accumulation,
    )
    if state is not None:
        engine.load_state(state)
    curve = train(engine, range(0 if state is None else 2, 4), 0, 1, accumulation)
    return engine.full_parameters(), curve, validate(step.transformer, World.alone(), folder).loss


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes, one clip at a time."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, results("train", 2, 2, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {kind: one_process(kind, folder, 2) for kind in ("lora", "full")}


def assert_same(found: dict[str, Any], weights: dict[str, torch.Tensor], wanted: Any) -> None:
    parameters, curve, validation = wanted
    assert torch.tensor(found["curve"]) == pytest.approx(torch.tensor(curve), rel=2e-5)
    assert found["validation"] == pytest.approx(validation, rel=2e-5)
    for name, value in parameters.items():
        # AdamW's first steps have the size of the learning rate even where a gradient is noise.
        assert torch.allclose(weights[name], value, atol=2e-4), name


@pytest.mark.parametrize(("kind", "stage"), RUNS)
def test_training_and_validation_equal_one_process(pair, alone, kind, stage):
    folder, ranks = pair
    name = f"{kind}{stage}"
    weights = torch.load(folder / f"{name}.pt", weights_only=True)
    for seen in ranks:
        assert_same(seen[name], weights, alone[kind])


@pytest.mark.parametrize(("kind", "stage"), RUNS)
def test_a_resumed_run_goes_on_to_the_bit(pair, kind, stage):
    _, ranks = pair
    for seen in ranks:
        assert seen[f"{kind}{stage}"]["resumed"] == seen[f"{kind}{stage}"]["curve"][2:]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_process_resumes_what_two_that_share_clips_wrote(pair, alone, kind, tmp_path):
    folder, _ = pair
    weights, curve, _ = one_process(kind, tmp_path, 2, folder / f"{kind}2")
    wanted, whole, _ = alone[kind]
    assert torch.tensor(curve) == pytest.approx(torch.tensor(whole[2:]), rel=2e-5)
    for name, value in wanted.items():
        assert torch.allclose(weights[name], value, atol=2e-4), name


def test_two_groups_train_on_different_clips(tmp_path):
    ranks = results("train", 4, 2, tmp_path)
    for kind in ("lora", "full"):
        weights = torch.load(tmp_path / f"{kind}2.pt", weights_only=True)
        wanted = one_process(kind, tmp_path / "alone", 4)
        for seen in ranks:
            assert_same(seen[f"{kind}2"], weights, wanted)


def test_dropout_falls_on_each_part_anew(pair):
    _, (first, second) = pair
    assert first["dropout"][0] == second["dropout"][0], "one clip, one loss"
    assert first["dropout"][1] != second["dropout"][1], "the same mask on both parts"


def test_what_cannot_be_shared_is_refused(tmp_path):
    for seen in results("refused", 2, 2, tmp_path):
        assert "distributed.sequence_parallel" in seen["processes"]
        assert "this run has 2 processes" in seen["processes"]
        assert "one of 1, 2" in seen["processes"]
        assert "distributed.sequence_parallel" in seen["heads"]
        assert "3 attention heads" in seen["heads"]
        assert "one of 1, 3" in seen["heads"]


def test_a_step_cache_keeps_each_processs_own_tokens(tmp_path):
    for seen in results("sample", 2, 2, tmp_path):
        for method in ("teacache", "magcache"):
            assert seen[method]["distance"] <= 1e-4
            assert seen[method]["shared"] == seen[method]["alone"] > 0
