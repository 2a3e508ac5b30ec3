"""Optimizers, schedules, clipping and the average of weights, in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.e2e.variant_project import VariantProject, base_config, write_clips, write_models
from trainer.adapters import load_adapter

pytestmark = pytest.mark.slow

STEPS = 6
EMA = {"decay": 0.8, "warmup": False}


def make_project(folder: Path, variant: str, **sections: Any) -> VariantProject:
    section = write_models(folder, variant, "comfy") | sections.pop("model", {})
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(section, {"general": {"resolution": [32, 32]}, "sources": sources})
    config["distributed"] = {"engine": "local", "device": "cpu"}
    config["training"]["max_steps"] = STEPS
    config["validation"] = {"split": 0.4, "timesteps": [300.0], "every_steps": STEPS}
    config["sampling"] |= {"every_steps": STEPS, "prompts": [{"prompt": "a cat", "seed": 3}]}
    project = VariantProject(folder, config | sections)
    project.cache()
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    return make_project(tmp_path_factory.mktemp("optimizers"), "wan2.1-t2v-1.3b")


def outputs(project: VariantProject, name: str, file: str) -> dict[str, torch.Tensor]:
    return load_file(project.run(name).output / f"{file}.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def stop_after_one_step(project: VariantProject, name: str, **changes: Any) -> None:
    project.run(name).request("stop")
    assert project.train(name, may_fail=True, **changes).code == 130


def sampled_with(project: VariantProject, name: str, file: str) -> torch.Tensor:
    use = [{"path": str(project.run(name).output / f"{file}.safetensors")}]
    (latents,) = project.sample(
        config=f"{name}.toml", loras=use, output=f"by-{name}-{file}"
    ).latents
    return latents


def test_the_average_is_written_sampled_validated_and_resumed(project):
    plain = project.train("plain", output__every_steps=1)
    done = project.train("ema", ema=EMA, output__every_steps=1)
    final = outputs(project, "ema", "ema")
    assert same(final, outputs(project, "plain", "plain")), "an average leaves training alone"
    average: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        name = "ema" if step == STEPS else f"ema-step{step:08d}"
        for key, value in outputs(project, "ema", name).items():
            old = average.get(key, value.double())
            average[key] = 0.8 * old + 0.2 * value.double()
    written = outputs(project, "ema", "ema-ema")
    for key, value in written.items():
        torch.testing.assert_close(value.double(), average[key], atol=1e-5, rtol=1e-4)
    with safe_open(project.run("ema").output / "ema-ema.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_output_name"], header["menma.averaged_weights"]) == ("ema-ema", "true")
    assert not same(written, final)

    trained, averaged = (sampled_with(project, "ema", file) for file in ("ema", "ema-ema"))
    torch.testing.assert_close(done.latents[-1], averaged, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain.latents[-1], trained, rtol=1e-3, atol=1e-4)
    assert (trained - averaged).abs().max() > 1e-3
    assert done.of("validation")[-1]["loss"] != plain.of("validation")[-1]["loss"]

    stop_after_one_step(project, "ema-parts", ema=EMA)
    project.train("ema-parts", ema=EMA)
    assert same(outputs(project, "ema-parts", "ema-parts-ema"), written)

    off = {"use_for_samples": False, "use_for_validation": False}
    unused = project.train("ema-off", ema=EMA | off)
    assert torch.equal(unused.latents[-1], plain.latents[-1])
    assert unused.of("validation")[-1]["loss"] == plain.of("validation")[-1]["loss"]


def test_other_options_of_the_average_are_warned_of_at_a_resume(project):
    stop_after_one_step(project, "changed", ema=EMA)
    done = project.train("changed", ema=EMA | {"decay": 0.5})
    assert any("[ema] changed" in event["message"] for event in done.of("warning"))


def test_schedulefree_writes_and_samples_its_average(project):
    options = {"optimizer__kind": "schedulefree", "optimizer__learning_rate": 0.02}
    done = project.train("free", **options, sampling__every_steps=2, validation__every_steps=2)
    straight = outputs(project, "free", "free")
    sampled = sampled_with(project, "free", "free")
    torch.testing.assert_close(done.latents[-1], sampled, rtol=1e-3, atol=1e-4)
    kept = project.checkpoint("free", STEPS)  # where gradients are taken: training goes on there
    for name, pair in load_adapter(project.output("free")).items():
        assert not torch.equal(pair.up_OR.flatten(), kept[f"{name}.up"]), name
    stop_after_one_step(project, "free-parts", **options)
    project.train("free-parts", **options)
    assert same(outputs(project, "free-parts", "free-parts"), straight)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prodigy", {"optimizer": {"kind": "prodigy", "d0": 1e-3}}),
        (
            "custom",
            {"optimizer": {"kind": "custom", "class": "torch.optim.NAdam", "learning_rate": 1e-2}},
        ),
        (
            "bf16",
            {
                "optimizer": {"kind": "adamw_bf16", "learning_rate": 1e-3},
                "adapter": {"kind": "none"},
                "memory__weight_format": "bf16",
                "sampling__every_steps": 0,
            },
        ),
    ],
)
def test_runs_resume_bit_for_bit(project, name, changes):
    done = project.train(name, **changes)
    stop_after_one_step(project, f"{name}-parts", **changes)
    project.train(f"{name}-parts", **changes)
    assert same(outputs(project, f"{name}-parts", f"{name}-parts"), outputs(project, name, name))
    assert len(done.of("step")) == STEPS
    assert not same(outputs(project, name, name), outputs(project, "plain", "plain"))


def test_schedule_and_clipping_reach_the_steps(project):
    done = project.train(
        "scheduled",
        lr_schedule={"kind": "rex", "warmup_ratio": 0.34, "min_lr_ratio": 0.1},
        optimizer__max_grad_value=1e-6,
    )
    rates = [event["lr"] for event in done.of("step")]
    full = rates[1]
    expected = [0.5, 1.0, 1.0, 0.1 + 0.9 * (2 / 3) / (0.5 + 1 / 3), 0.1 + 0.9 / 3 / (2 / 3), 0.1]
    assert [rate / full for rate in rates] == pytest.approx(expected)
    assert not same(outputs(project, "scheduled", "scheduled"), outputs(project, "plain", "plain"))


def test_both_experts_have_an_average_each(tmp_path):
    turns = {"steps_per_turn": 1, "high_noise_share": 0.5}
    project = make_project(tmp_path, "wan2.2-t2v-a14b", model={"expert": "both"}, experts=turns)
    project.train(
        "two",
        ema=EMA,
        validation__every_steps=0,
        sampling__every_steps=0,
    )
    for expert in ("high_noise", "low_noise"):
        plain, averaged = (
            outputs(project, "two", f"two_{expert}{suffix}") for suffix in ("", "-ema")
        )
        assert plain.keys() == averaged.keys()
        assert not same(plain, averaged)
