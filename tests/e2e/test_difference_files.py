"""A few-step LoRA with whole differences, from files to latents: attached, merged, in fp8."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.adapters.difference_files import distilled, write
from tests.e2e.test_fp8 import make_project
from tests.e2e.variant_project import random_transformer

pytestmark = pytest.mark.slow


def distilled_for(base: Path, lora: Path, seed: int) -> Path:
    """Write such a LoRA for a transformer file of the tests."""
    model = random_transformer("wan2.1-t2v-1.3b", 0)
    own = {key.removeprefix("model.diffusion_model."): t for key, t in load_file(base).items()}
    model.load_state_dict({name: tensor.float() for name, tensor in own.items()})
    return write(lora, distilled(model, seed=seed))


def test_sampling_with_differences_is_sampling_the_merged_model(tmp_path):
    project = make_project(tmp_path)
    base = tmp_path / "models/transformer.safetensors"
    lora = distilled_for(base, tmp_path / "fast.safetensors", 3)
    project.config["sampling"]["prompts"] = [{"prompt": "a red field"}]
    plain = project.write("plain.toml")
    loras = [{"path": str(lora), "strength": 0.5}]
    always = project.write("always.toml", sampling__loras=loras)
    (without,) = project.sample(config=plain, output="without").latents
    (attached,) = project.sample(config=always, output="attached").latents
    project.job("merge", base=str(base), loras=loras, output="merged.safetensors", dtype="fp32")
    merged = project.write("merged.toml", model__transformer="merged.safetensors")
    (expected,) = project.sample(config=merged, output="merged").latents
    moved = float((expected - without).norm())
    assert moved > 0.05 * float(expected.norm())
    assert float((attached - expected).norm()) < 1e-3 * moved
    (summed,) = project.sample(config=always, output="summed", merge_loras=True).latents
    assert float((summed - expected).norm()) < 1e-3 * moved
    for name, memory in (
        ("streamed", {"memory__blocks_to_swap": 1}),
        ("fp8", {"memory__weight_format": "fp8_scaled"}),
    ):
        config = project.write(f"{name}.toml", sampling__loras=loras, **memory)
        (found,) = project.sample(config=config, output=name).latents
        allowed = 0.3 if name == "fp8" else 1e-3
        assert float((found - expected).norm()) < allowed * moved, name


def test_each_expert_samples_with_its_own_differences(tmp_path):
    project = make_project(tmp_path, "wan2.2-t2v-a14b")
    section = project.config["model"]
    section["expert"] = "both"
    project.config["training"]["max_steps"] = 200
    bases = {"low_noise": section["transformer"], "high_noise": section["transformer_high_noise"]}
    loras = []
    for seed, (expert, base) in enumerate(bases.items()):
        path = tmp_path / f"fast-{expert}.safetensors"
        distilled_for(tmp_path / base, path, seed)
        loras.append({"path": str(path), "strength": 0.5, "expert": expert})
    project.config["sampling"]["prompts"] = [{"prompt": "a red field"}]
    plain = project.write("plain.toml")
    (without,) = project.sample(config=plain, output="without").latents
    (attached,) = project.sample(config=plain, output="attached", loras=loras).latents
    project.job("merge", base=bases["low_noise"], base_high_noise=bases["high_noise"],
                loras=loras, output="merged.safetensors", dtype="fp32")  # fmt: skip
    merged = project.write(
        "merged.toml",
        model__transformer="merged_low_noise.safetensors",
        model__transformer_high_noise="merged_high_noise.safetensors",
    )
    (expected,) = project.sample(config=merged, output="merged").latents
    moved = float((expected - without).norm())
    assert moved > 0.05 * float(expected.norm())
    assert float((attached - expected).norm()) < 1e-3 * moved
