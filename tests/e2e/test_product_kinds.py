"""LoHa, LoKr and DoRA through whole jobs: train, go on, sample, merge, and what check refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.e2e.variant_project import VariantProject, base_config, write_clips, write_models
from trainer.adapters import load_adapter
from trainer.contract.lora_use import LoRAUse
from trainer.jobs.convert import convert_lora
from trainer.jobs.inspect_lora import inspect_lora
from trainer.jobs.merge import merge_loras

pytestmark = pytest.mark.slow
KINDS: dict[str, dict[str, Any]] = {
    "loha": {"kind": "loha", "rank": 3},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "lr_pattern": {r".*\.ffn\..*": 0.5}},
    "dora": {"kind": "dora", "rank": 3, "rank_pattern": {r".*\.ffn\..*": 5}},
}
PROMPTS = [{"prompt": "a red field", "seed": 1}]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("kinds")
    model = write_models(folder, "wan2.1-t2v-1.3b", "comfy")
    write_clips(folder / "clips", 3, 5, 32, 32)
    sources = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": sources})
    project = VariantProject(folder, config)
    project.config["training"]["max_steps"] = 3
    project.cache()
    return project


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = load_file(path)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_trained_here_and_there_gone_on_sampled_and_merged(project, kind):
    adapter = KINDS[kind]
    one = f"{kind}-one"
    done = project.train(one, adapter=adapter, distributed__engine="local")
    assert len(done.of("step")) == 3
    whole = tensors(project.output(one))

    # Swapped blocks under DeepSpeed, stopped after a step and gone on with.
    two = f"{kind}-two"
    elsewhere = {"adapter": adapter, "memory__blocks_to_swap": 1, "distributed__zero_stage": 2}
    project.run(two).request("stop")
    assert project.train(two, may_fail=True, **elsewhere).code == 130
    project.train(two, **elsewhere)
    again = tensors(project.output(two))
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-4)

    summary = inspect_lora(project.output(one))
    assert summary["kind"] == kind
    assert summary["zero_modules"] == 0
    with safe_open(project.output(one), "pt") as file:
        assert file.metadata()["menma.kind"] == kind

    config = project.write(f"{one}.toml", name=one, adapter=adapter, sampling__prompts=PROMPTS)
    (attached,) = project.sample(config=config, run_dir=f"runs/{one}").latents
    (plain,) = project.sample(config=config).latents
    base = project.folder / project.config["model"]["transformer"]
    merged = project.folder / f"{kind}-merged.safetensors"
    merge_loras(base, [LoRAUse(path=project.output(one))], merged)
    changed = project.write(
        f"{kind}-merged.toml", name="merged", model__transformer=merged.name,
        sampling__prompts=PROMPTS,
    )  # fmt: skip
    (baked,) = project.sample(config=changed).latents
    assert (attached - plain).abs().max() > 1e-3
    torch.testing.assert_close(baked, attached, rtol=1e-3, atol=1e-3)

    kohya = project.folder / f"{kind}-kohya.safetensors"
    convert_lora(project.output(one), kohya, layout="kohya")
    for name, update in load_adapter(kohya).items():
        weight = torch.randn(update.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            update.added_to(weight), load_adapter(project.output(one))[name].added_to(weight)
        )


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_layout_that_diffusers_does_not_load_is_refused_before_training(project, kind):
    for job in ("check", "train"):
        config = project.write(name="peft", adapter=KINDS[kind], output__layout="peft")
        done = project.job(job, may_fail=True, config=config)
        assert done.code == 2
        for word in ("output.layout", "diffusers loads no Lo", "comfy"):
            assert word in done.words
    assert not project.run("peft").root.exists()


def test_another_scale_does_not_go_on_from_a_checkpoint(project):
    project.train("scale", adapter=KINDS["lokr"], training__max_steps=1)
    other = {**KINDS["lokr"], "alpha": 5.0}
    done = project.train("scale", may_fail=True, adapter=other)
    assert done.code == 2
    assert "scale" in done.words


def test_a_companion_of_any_kind_lies_under_any_kind(project):
    project.train("style", adapter=KINDS["loha"])
    frozen = [{"path": str(project.output("style")), "strength": 0.5}]
    project.train("on-style", adapter={**KINDS["dora"], "frozen": frozen})
    adapter = load_adapter(project.output("on-style"))
    assert {update.kind for update in adapter.values()} == {"dora"}
    project.train("style-of-dora", adapter=KINDS["dora"])
    frozen = [{"path": str(project.output("style-of-dora"))}]
    done = project.train("on-dora", adapter={**KINDS["loha"], "frozen": frozen})
    assert len(done.of("step")) == 3
