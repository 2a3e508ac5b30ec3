"""The benchmark of slots: its configs are right and fair, and its figure is what it says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from trainer.bench import loraid
from trainer.bench.loraid import CONCEPTS, KINDS, SlotPlan, measure
from trainer.contract.config_io import load_config
from trainer.contract.loraid_rules import loraid_options
from trainer.contract.memory_model.workload import workload_of

PLAN = SlotPlan(num_clips=2, num_held_out=1, num_known=2, num_shots=2)


@pytest.fixture
def jobs(monkeypatch):
    """Take jobs and merges instead of running them; merging raises the loss."""
    told = []

    def run(name, request, emit):
        config = load_config(request.config)
        told.append((name, config))
        loss = 1.25 if config.name.startswith("merged-ordinary") else 0.75
        emit("phase", name="other events do not count")
        alone = None if config.name.startswith("merged") else {"loss": 0.5}
        emit(
            "end",
            probe={"figures": {"concept_with_trigger": 1.0, "concept_leak": 0.0}},
            validation={"base": {"loss": loss if alone is None else 2.5}, "trained": alone},
        )

    class Jobs:
        def load(self, name):
            return partial(run, name)

    monkeypatch.setattr(loraid, "JOBS", Jobs())
    monkeypatch.setattr(
        loraid, "merge_loras", lambda base, loras, output: told.append((base, loras))
    )
    return told


def test_what_is_lost_is_a_share_of_the_fall_of_the_loss(jobs, tmp_path):
    found = measure(PLAN, tmp_path)
    assert found.value == pytest.approx((0.75 - 0.5) / (2.5 - 0.5))
    assert found.figures["lost_by_ordinary_loras"] == pytest.approx((1.25 - 0.5) / (2.5 - 0.5))
    assert set(found.figures["alone"]) == set(found.figures["merged"]) == set(KINDS)
    assert found.figures["alone"]["slots"]["beams"]["validation_loss"] == 0.5
    assert found.figures["merged"]["slots"]["beams"]["validation_loss"] == 0.75
    assert found.fields["fine"]


def test_three_slots_and_three_ordinary_loras_have_as_many_parameters(jobs, tmp_path):
    measure(PLAN, tmp_path)
    trained = [config for name, config in jobs if name == "train"]
    assert len(trained) == len(CONCEPTS) * len(KINDS)
    sizes = {workload_of(config).trained_parameters for config in trained}
    assert len(sizes) == 1
    slots = [options for config in trained if (options := loraid_options(config)) is not None]
    assert [options.slot for options in slots] == [1, 2, 3]
    assert {config.probe.options("kind")["ground"] for config in trained} == set(CONCEPTS)
    merged = [loras for name, loras in jobs if isinstance(name, Path)]
    assert [len(loras) for loras in merged] == [3, 3]
    assert len(list((tmp_path / "clips").glob("*/*.mp4"))) == 3 * (2 + 1) + 2


def test_each_is_looked_at_alone_and_merged(jobs, tmp_path):
    measure(PLAN, tmp_path)
    names = [name for name, _ in jobs if isinstance(name, str)]
    assert names == ["cache", "train", "eval"] * 3 + ["train", "eval"] * 3 + ["eval"] * 6
    assert len({config.name for name, config in jobs if name == "eval"}) == 12
