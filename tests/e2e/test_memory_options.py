"""Runs that stream blocks and park activations: the same training, from the files to the LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_training_options import assert_same, losses, trained
from tests.e2e.variant_project import VariantProject, base_config, write_clips, write_models

pytestmark = pytest.mark.slow

ALL = {
    "memory__blocks_to_swap": 2,
    "memory__offload_checkpoints": True,
    "memory__gradient_checkpointing": True,
}
SAMPLES = {
    "sampling__every_steps": 2,
    "sampling__num_steps": 2,
    "sampling__prompts": [{"prompt": "a", "width": 32, "height": 32, "num_frames": 5}],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("streamed")
    model = write_models(folder, "wan2.2-t2v-a14b", "comfy")
    model["expert"] = "low_noise"
    write_clips(folder / "clips", 2, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    project = VariantProject(
        folder, base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    )
    project.config["training"]["max_steps"] = 3
    project.cache()
    return project


@pytest.mark.parametrize(("engine", "stage"), [("local", 0), ("deepspeed", 2)])
def test_streaming_with_two_experts_and_samples_changes_nothing(project, engine, stage) -> None:
    where = {"distributed__engine": engine, "distributed__zero_stage": stage, **SAMPLES}
    plain = project.train(f"plain-{engine}", **where)
    streamed = project.train(f"streamed-{engine}", **where, **ALL)
    assert losses(streamed) == losses(plain)
    assert_same(trained(project, f"streamed-{engine}"), trained(project, f"plain-{engine}"))
    samples = [Path(e["path"]).name for e in streamed.of("sample")]
    assert samples == [Path(e["path"]).name for e in plain.of("sample")]
    assert samples
