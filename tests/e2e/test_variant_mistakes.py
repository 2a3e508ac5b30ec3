"""Mistakes that one kind of model allows: two experts, encoders, models without training."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest

from tests.e2e.variant_project import (
    VariantProject,
    base_config,
    write_clips,
    write_models,
)

pytestmark = pytest.mark.slow


def new_project(folder: Path, variant: str, **model: str) -> VariantProject:
    """Make a project of two clips."""
    section = write_models(folder, variant, "comfy") | model
    write_clips(folder / "clips", 2, 5, 32, 32)
    dataset = {
        "general": {"resolution": [32, 32]},
        "sources": [{"video_directory": "clips", "target_frames": [5]}],
    }
    return VariantProject(folder, base_config(section, dataset))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("experts")
    project = new_project(folder, "wan2.2-t2v-a14b", expert="high_noise")
    project.config["training"]["max_steps"] = 1
    project.cache()
    return project


def without(project: VariantProject, *fields: str) -> VariantProject:
    """Return the project with keys of `[model]` left out."""
    config = copy.deepcopy(project.config)
    for field in fields:
        del config["model"][field]
    return VariantProject(project.folder, config)


@pytest.mark.parametrize(
    ("expert", "own", "given"),
    [
        ("high_noise", "875 to 1000", {"max_timestep": 500}),
        ("low_noise", "0 to 875", {"min_timestep": 900}),
    ],
)
def test_timesteps_outside_the_experts_range_are_refused(experts, expert, own, given):
    changes = {f"objective__{key}": value for key, value in given.items()}
    done = experts.train("range", may_fail=True, model__expert=expert, **changes)
    assert done.code == 2
    assert all(f"objective.{key}" in done.words for key in given)
    assert own in done.words
    assert not experts.run("range").root.exists()


def test_the_experts_range_may_be_cut(experts):
    done = experts.train("cut", objective__min_timestep=950, training__max_steps=4)
    sigmas = [float(noisy.sigma_B) for noisy, _ in done.steps]
    assert len(sigmas) == 4
    assert all(0.95 <= sigma <= 1 for sigma in sigmas)


def test_one_expert_does_not_go_on_from_the_others_checkpoint(experts):
    experts.train("same-name")
    before = experts.output("same-name").read_bytes()
    done = experts.train("same-name", may_fail=True, model__expert="low_noise")
    assert done.code == 2
    assert "high_noise" in done.words
    assert "low_noise" in done.words
    assert experts.output("same-name").read_bytes() == before
    shutil.rmtree(experts.run("same-name").root)
