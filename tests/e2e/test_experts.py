"""Both experts of Wan 2.2 in one run, against the same experts trained each on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.e2e.variant_project import (
    Done,
    VariantProject,
    base_config,
    write_clips,
    write_models,
)
from trainer.adapters import load_adapter

T2V = "wan2.2-t2v-a14b"
STEPS = 14
"""Turns of 3 steps: high, low, high, low, then 2 of high: 8 and 6."""
OWN = {"high_noise": 8, "low_noise": 6}


def make_project(folder: Path) -> VariantProject:
    section = write_models(folder, T2V, "comfy") | {"expert": "both"}
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(section, {"general": {"resolution": [32, 32]}, "sources": sources})
    config["distributed"] = {"engine": "local", "device": "cpu"}
    config["training"]["max_steps"] = STEPS
    config["experts"] = {"steps_per_turn": 3, "high_noise_share": 0.5}
    config["high_noise"] = {"learning_rate": 0.01, "flow_shift": 5.0}
    config["lr_schedule"] = {"kind": "cosine", "warmup_steps": 2}
    config["validation"] = {"split": 0.4, "timesteps": [200.0, 600.0, 950.0]}
    project = VariantProject(folder, config)
    project.cache()
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    return make_project(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def alone(project: VariantProject) -> dict[str, Done]:
    """A run of each expert, of as many steps as it gets in the run of both."""
    return {
        expert: project.train(
            expert,
            model__expert=expert,
            training__max_steps=steps,
            validation__every_steps=steps,
        )
        for expert, steps in OWN.items()
    }


@pytest.fixture(scope="module")
def both(project: VariantProject) -> Done:
    return project.train("both", validation__every_steps=STEPS, checkpoint__every_steps=5)


def factors(path: Path) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(pair, part)
        for name, pair in load_adapter(path).items()
        for part in ("down_RI", "up_OR")
    }


def pair_of(project: VariantProject, run: str) -> dict[str, Path]:
    return {expert: project.run(run).output / f"{run}_{expert}.safetensors" for expert in OWN}


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = factors(one), factors(other)
    assert ours.keys() == theirs.keys()
    assert any(bool(value.any()) for name, value in ours.items() if name.endswith("up_OR"))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_each_expert_comes_out_as_from_a_run_of_its_own(
    project: VariantProject, alone: dict[str, Done], both: Done
) -> None:
    """Bit for bit: weights, losses, learning rates and gradient norms."""
    steps = both.of("step")
    for expert, path in pair_of(project, "both").items():
        assert_same(path, project.output(expert))
        ours = [step for step in steps if f"{expert}.loss" in step["terms"]]
        theirs = alone[expert].of("step")
        assert len(ours) == len(theirs) == OWN[expert]
        for key in ("loss", "lr", "grad_norm"):
            assert [step[key] for step in ours] == [step[key] for step in theirs], key
    order = [next(iter(step["terms"])).split(".")[0][0] for step in steps]
    assert "".join(order) == "hhhlllhhhlllhh"
