"""Full fine-tunes whose state and weights wait in RAM, and what `menma config deepspeed` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.variant_project import Done, VariantProject, base_config, write_clips, write_models
from tests.engine.test_nvme import needs_files
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.jobs import train_parts

pytestmark = pytest.mark.slow

FULL = {
    "adapter": {"kind": "none"},
    "optimizer__learning_rate": 1e-3,
    "memory__weight_format": "bf16",
}
PLACES: dict[str, dict[str, Any]] = {
    "2": {"distributed__zero_stage": 2, "distributed__offload_optimizer": "cpu"},
    "3": {
        "distributed__zero_stage": 3,
        "distributed__offload_optimizer": "cpu",
        "distributed__offload_parameters": "cpu",
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("offload")
    model = write_models(folder, "wan2.1-t2v-1.3b", "comfy")
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    project = VariantProject(folder, config)
    project.config["training"]["max_steps"] = 3
    project.cache()
    return project


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what every engine that is made tells DeepSpeed."""
    configs = []

    class Recorded(DeepSpeedEngine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            configs.append(self.config)

    monkeypatch.setattr(train_parts, "DeepSpeedEngine", Recorded)
    return configs


def losses(done: Done) -> list[float]:
    return [event["loss"] for event in done.of("step")]


def assert_same(project: VariantProject, one: str, other: str) -> None:
    ours, theirs = (load_file(project.output(name)) for name in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("stage", PLACES)
def test_a_full_fine_tune_is_the_same_and_goes_on_with_or_without_offload(
    project: VariantProject, stage: str
) -> None:
    options = {**FULL, "optimizer__max_grad_norm": 0.0, "distributed__zero_stage": int(stage)}
    whole = project.train(f"plain-{stage}", **options)
    offloaded = project.train(f"offload-{stage}", **options | PLACES[stage])
    assert losses(offloaded) == losses(whole)
    assert_same(project, f"offload-{stage}", f"plain-{stage}")

    name = f"parts-{stage}"
    project.run(name).request("stop")
    assert project.train(name, may_fail=True, **options | PLACES[stage]).code == 130
    project.run(name).request("stop")
    assert project.train(name, may_fail=True, **options).code == 130
    project.train(name, **options | PLACES[stage])
    assert_same(project, name, f"plain-{stage}")


@needs_files
def test_a_run_may_keep_its_state_and_weights_in_files(
    project: VariantProject, tmp_path: Path
) -> None:
    options = {**FULL, "optimizer__max_grad_norm": 0.0, "distributed__zero_stage": 3}
    whole = project.train("ram", **options)
    places = {
        "distributed__offload_optimizer": "nvme",
        "distributed__offload_parameters": "nvme",
        "distributed__nvme_path": str(tmp_path),
    }
    assert losses(project.train("files", **options | places)) == losses(whole)
    assert_same(project, "files", "ram")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {**FULL, **PLACES["2"]},
        {**FULL, **PLACES["3"], "training__gradient_accumulation_steps": 2},
        {"distributed__zero_stage": 1},
        {"distributed__zero_stage": 1, "adapter__kind": "dora"},
        {"distributed__zero_stage": 0, "memory__weight_format": "fp8_scaled"},
        {
            "distributed__zero_stage": 2,
            "adapter__include": [r"blocks\.0\..*"],
            "techniques": [{"name": "contrastive_flow"}],
            "dataset__sources": [
                {"video_directory": "clips", "target_frames": [5], "batch_size": 2}
            ],
        },
    ],
    ids=["full-2", "full-3", "lora-1", "dora-1", "fp8-0", "technique-2"],
)
def test_the_shown_config_is_the_engines_own(
    project: VariantProject, told: list[dict[str, Any]], changes: dict[str, Any]
) -> None:
    name = f"shown-{len(list(project.folder.glob('shown-*.toml')))}"
    if "dataset__sources" in changes:
        project.cache(**changes)
    project.train(name, training__max_steps=1, **changes)
    (end,) = project.job("deepspeed", config=f"{name}.toml").of("end")
    assert [end["deepspeed"]] == told
    trained = sum(value.numel() for value in project.checkpoint(name, 1).values())
    zero = end["deepspeed"]["zero_optimization"]
    assert zero["stage"] == changes["distributed__zero_stage"]
    assert zero.get("reduce_bucket_size", trained) == trained


def test_the_config_is_shown_without_weights(project: VariantProject) -> None:
    config = project.write(
        "absent.toml",
        model={"variant": "wan2.1-t2v-14b", "transformer": "absent.safetensors"},
        distributed__zero_stage=2,
    )
    (end,) = project.job("deepspeed", config=config).of("end")
    blocks, dim, ffn, rank = 40, 5120, 13824, 4
    each = 8 * rank * (dim + dim) + 2 * rank * (dim + ffn)
    assert end["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == blocks * each


def test_a_run_without_deepspeed_has_no_config_for_it(project: VariantProject) -> None:
    config = project.write("local.toml", distributed__engine="local")
    done = project.job("deepspeed", config=config, may_fail=True)
    assert done.code == 2
    assert "would not use DeepSpeed" in done.words
