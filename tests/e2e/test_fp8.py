"""Runs whose transformer is held in fp8: engines, files, experts, sampling, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.project import copy_project
from tests.e2e.test_training_options import losses, trained
from tests.e2e.variant_project import (
    HEADS,
    VariantProject,
    base_config,
    write_clips,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.contract.variants import TransformerConfig
from trainer.models import load_transformer
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer

pytestmark = pytest.mark.slow

SCALED = {"memory__weight_format": "fp8_scaled"}
BF16 = {"memory__weight_format": "bf16"}


def make_project(folder: Path, variant: str = "wan2.1-t2v-1.3b") -> VariantProject:
    model = write_models(folder, variant, "comfy")
    write_clips(folder / "clips", 2, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    project = VariantProject(
        folder, base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    )
    project.config["training"]["max_steps"] = 3
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    project = make_project(tmp_path_factory.mktemp("fp8"))
    project.cache()
    return project


def quantise_file(folder: Path, field: str = "transformer", *, scaled: bool = True) -> None:
    """Turn a ComfyUI file into the fp8 one that ComfyUI ships beside it."""
    path = folder / "models" / f"{field}.safetensors"
    prefix = "model.diffusion_model."
    tensors = {}
    for name, value in load_file(path).items():
        if ".blocks." not in name or value.dim() != 2:
            tensors[name] = value
            continue
        scale = value.abs().amax(1) / 448 if scaled else torch.ones(len(value))
        tensors[name] = (value / scale[:, None]).to(torch.float8_e4m3fn)
        if scaled:
            tensors[name.replace(".weight", ".scale_weight")] = scale
    if scaled:
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)


@pytest.mark.parametrize(("engine", "stage"), [("local", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_a_lora_on_fp8_learns_nearly_as_on_bf16(project, engine, stage):
    where = {"distributed__engine": engine, "distributed__zero_stage": stage}
    if not project.output("exact").is_file():
        project.train("exact", distributed__engine="local", **BF16)
    name = f"fp8-{engine}-{stage}"
    done = project.train(name, **where, **SCALED)
    exact = [event["loss"] for event in _events(project, "exact")]
    np.testing.assert_allclose(losses(done), exact, rtol=0.05)
    assert losses(done) != exact
    ours, theirs = (load_adapter(project.output(n)) for n in (name, "exact"))
    for module, pair in theirs.items():
        wanted, found = pair.up_OR @ pair.down_RI, ours[module].up_OR @ ours[module].down_RI
        assert torch.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.5, module
    (words,) = [e["message"] for e in done.of("log") if "relative error" in e["message"]]
    assert "rounded to e4m3" in words


def _events(project: VariantProject, name: str) -> list[dict[str, Any]]:
    from trainer.contract.events import EventReader

    return [e for e in EventReader(project.run(name).events).read() if e["type"] == "step"]


def test_engines_agree_on_fp8(project):
    names = ("agree-local", "agree-deepspeed")
    project.train(names[0], distributed__engine="local", **SCALED)
    project.train(names[1], distributed__engine="deepspeed", **SCALED)
    ours, theirs = (trained(project, name) for name in names)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_train_on_fp8_as_one(cached_project, tmp_path, stage):
    outputs = []
    for processes in (1, 2):
        project = copy_project(cached_project, tmp_path / str(processes))
        settings = {
            "memory.weight_format": "fp8_scaled",
            "distributed.engine": "deepspeed",
            "distributed.num_processes": processes,
            "distributed.zero_stage": stage,
            # Two processes see two clips in each step, so one accumulates two to do the same.
            "training.gradient_accumulation_steps": 2 // processes,
            "adapter.dropout": 0,
        }
        changes = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
        project.done("train", project.config, *changes)
        outputs.append((project.events("step"), load_file(project.output)))
    (one, alone), (two, together) = outputs
    np.testing.assert_allclose([e["loss"] for e in two], [e["loss"] for e in one], rtol=1e-3)
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, alone[name], rtol=0.02, atol=2e-3)


def test_two_processes_share_swapped_blocks(cached_project, tmp_path):
    outputs = []
    for swapped in (0, 1):
        project = copy_project(cached_project, tmp_path / str(swapped))
        settings = {
            "memory.weight_format": "fp8_scaled",
            "memory.blocks_to_swap": swapped,
            "distributed.engine": "deepspeed",
            "distributed.num_processes": 2,
        }
        changes = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
        project.done("train", project.config, *changes)
        outputs.append((project.events("step"), load_file(project.output)))
    (one, plain), (two, streamed) = outputs
    assert [e["loss"] for e in two] == [e["loss"] for e in one]
    for name, tensor in streamed.items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("options", [{}, {"memory__fp8_format": "e5m2"}], ids=["e4m3", "e5m2"])
def test_plain_fp8_trains(project, options):
    name = f"plain-{len(options)}"
    done = project.train(name, memory__weight_format="fp8", **options)
    assert len(losses(done)) == 3


def test_a_file_in_fp8_trains_samples_and_merges(tmp_path):
    project = make_project(tmp_path)
    quantise_file(tmp_path)
    project.config["memory"]["weight_format"] = "fp8_scaled"
    project.config["sampling"]["prompts"] = [{"prompt": "a red field"}]
    project.cache()
    done = project.train("ready", sampling__every_steps=3, validation__every_steps=3,
                         validation__split=0.5)  # fmt: skip
    assert any("fp8 as in the file" in event["message"] for event in done.of("log"))
    assert len(done.of("sample")) == 1
    assert len(done.of("validation")) == 2
    measured = project.job("eval", config="ready.toml", run_dir="runs/ready")
    (figures,) = measured.of("end")
    assert figures["validation"]["base"]["loss"] == pytest.approx(
        done.of("validation")[0]["loss"], rel=1e-5
    )
    (latents,) = project.sample(run_dir="runs/ready", config="ready.toml").latents
    lora = {"path": str(project.output("ready")), "strength": 1.0}
    model = project.config["model"]["transformer"]
    project.job("merge", base=model, loras=[lora], output="merged.safetensors", dtype="fp32")
    merged = project.write(
        "merged.toml", model__transformer="merged.safetensors", memory__weight_format="bf16"
    )
    (expected,) = project.sample(config=merged).latents
    # bf16 rounds what fp8 held, and the factors of an attached LoRA.
    assert float((latents - expected).norm() / expected.norm()) < 0.05
    assert load_transformer(tmp_path / "merged.safetensors", config={"num_heads": HEADS})


def test_fp8_products_train_and_sample(tmp_path):
    project = make_project(tmp_path)
    path = tmp_path / "models/transformer.safetensors"
    shape = TransformerConfig(
        dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
    )
    model = WanTransformer(shape, seed=None)
    init_fan_in(model, 1)
    model.variant_name = "wan2.1-t2v-1.3b"
    save_transformer(model, path)
    project.config["sampling"]["prompts"] = [{"prompt": "a red field"}]
    project.cache()
    runs = [
        project.train(name, memory__fp8_matmul=matmul, **SCALED)
        for name, matmul in (("products", True), ("dequantised", False))
    ]
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=0.05)
    assert losses(runs[0]) != losses(runs[1])
    (latents,) = project.sample(run_dir="runs/products", config="products.toml").latents
    assert bool(torch.isfinite(latents).all())


def test_both_experts_are_fp8(tmp_path):
    project = make_project(tmp_path, "wan2.2-t2v-a14b")
    project.config["model"]["expert"] = "low_noise"
    project.config["memory"]["weight_format"] = "fp8_scaled"
    project.config["sampling"]["prompts"] = [{"prompt": "a red field"}]
    quantise_file(tmp_path, "transformer_high_noise")
    project.cache()
    done = project.train("experts", sampling__every_steps=3)
    assert len(done.of("sample")) == 1
    (latents,) = project.sample(run_dir="runs/experts", config="experts.toml").latents
    assert bool(torch.isfinite(latents).all())


REFUSED = [
    ({"adapter": {"kind": "none"}, **SCALED}, "memory.weight_format", "frozen", 'kind = "lora"'),
    ({"memory__fp8_format": "e5m2", **BF16}, "memory.fp8_format", "fp8 weights only", "fp8_scaled"),
    ({"memory__fp8_matmul": True, **BF16}, "memory.fp8_matmul", "fp8 weights only", "fp8_scaled"),
    (
        {"memory__fp8_matmul": True, "memory__fp8_format": "e5m2", **SCALED},
        "memory.fp8_format",
        "e4m3 with e4m3",
        'fp8_format = "e4m3"',
    ),
    ({"memory__fp8_matmul": True, **SCALED}, "memory.fp8_matmul", "multiples of 16", "false"),
    ({"memory__attention": "flash"}, "memory.attention", "unknown attention", "flash"),
    ({"memory__attention": "sage"}, "memory.attention", "no backward", "sdpa"),
    ({"memory__attention": "flash2"}, "memory.attention", "not installed", "pip install"),
    ({"memory__attention": "flex"}, "memory.attention", "no backward on a CPU", "sdpa"),
    (
        {"memory__attention": "flex", "memory__keep_attention": True},
        "memory.keep_attention",
        "flex",
        "sdpa",
    ),
]


@pytest.mark.parametrize(("changes", "key", "words", "hint"), REFUSED)
@pytest.mark.parametrize("job", ["check", "train"])
def test_what_cannot_work_is_refused_with_key_and_line(project, job, changes, key, words, hint):
    config = project.write("refused.toml", name="refused", **changes)
    done = project.job(job, config=config, may_fail=True)
    assert done.code == 2
    message = done.words
    assert f"{key}: " in message
    assert words in message
    assert hint in message
    if key.rpartition(".")[2] in (project.folder / config).read_text():
        assert "refused.toml:" in message
    assert not project.run("refused").root.exists()


@pytest.mark.parametrize(
    ("scaled", "asked", "hint"), [(True, "fp8", '"fp8_scaled"'), (False, "fp8_scaled", '"fp8"')]
)
def test_fp8_on_a_file_in_another_fp8_format_is_refused(tmp_path, scaled, asked, hint):
    project = make_project(tmp_path)
    quantise_file(tmp_path, scaled=scaled)
    project.cache()
    config = project.write("refused.toml", name="refused", memory__weight_format=asked)
    for job in ("check", "train", "sample"):
        done = project.job(job, config=config, may_fail=True)
        assert done.code == 2
        assert "memory.weight_format: " in done.words
        assert f"weight_format = {hint}" in done.words
        assert "transformer.safetensors is" in done.words


def test_sampling_may_use_what_training_may_not(project):
    prompts = [{"prompt": "a red field"}]
    (expected,) = project.sample(config=project.write("a.toml", sampling__prompts=prompts)).latents
    config = project.write("b.toml", sampling__prompts=prompts, memory__attention="flex")
    (found,) = project.sample(config=config).latents
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    sage = project.write("c.toml", sampling__prompts=prompts, memory__attention="sage")
    done = project.job("sample", config=sage, may_fail=True)
    assert "no backward" not in done.words
    assert "pip install sageattention" in done.words
