"""T-LoRA, SingLoRA, ReLoRA, GGPO and VeRA in whole runs: train, resume, sample, merge."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.variant_project import VariantProject, base_config, write_clips, write_models
from trainer.adapters import load_adapter

pytestmark = pytest.mark.slow

STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "tlora": {"rank": 4, "min_rank": 1, "full_rank_below": 50.0},
    "singlora": {"rank": 4, "ramp_steps": 4},
    "relora": {"rank": 2, "restart_every_steps": 2, "restart_warmup_steps": 2},
    "ggpo": {"rank": 4, "norms_every_steps": 3, "sigma": 0.1},
    "vera": {"rank": 8},
}
ENGINES = [("local", 0), ("deepspeed", 2)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    folder = tmp_path_factory.mktemp("kinds")
    model = write_models(folder, "wan2.1-t2v-1.3b", "comfy")
    write_clips(folder / "clips", 2, 5, 32, 32)
    source = {"video_directory": "clips", "target_frames": [5], "num_repeats": 2}
    general = {"resolution": [32, 32], "batch_size": 2}
    config = base_config(model, {"general": general, "sources": [source]})
    config["training"] = {"max_steps": STEPS, "gradient_accumulation_steps": 2}
    config["checkpoint"] = {"every_steps": 1, "keep_last": 99}
    config["sampling"] |= {"every_steps": STEPS, "prompts": [{"prompt": "a cat", "seed": 3}]}
    project = VariantProject(folder, config)
    project.cache()
    return project


def adapter(kind: str) -> dict[str, Any]:
    return {"adapter": {"kind": kind, **KINDS[kind]}}


def held(project: VariantProject, name: str) -> dict[str, torch.Tensor]:
    """Return everything the last checkpoint holds."""
    folder = project.run(name).checkpoints / f"step-{STEPS:08d}"
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.name}|{key}": t for f in files for key, t in load_file(f).items()}


@pytest.fixture(scope="module", params=KINDS)
def whole(project: VariantProject, request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Train without a break on the local engine; return the kind and what was seen."""
    kind = request.param
    done = project.train(kind, **adapter(kind), distributed__engine="local")
    assert [event["step"] for event in done.of("step")] == list(range(1, STEPS + 1))
    return kind, done


def test_a_sample_with_the_file_is_the_sample_of_the_training(project, whole):
    kind, done = whole
    (ours,) = done.latents
    use = [{"path": str(project.output(kind))}]
    (theirs,) = project.sample(config=f"{kind}.toml", loras=use, output=f"s-{kind}").latents
    (base,) = project.sample(config=f"{kind}.toml", output=f"b-{kind}").latents
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - base).abs().max() > 20 * (ours - theirs).abs().max()


def test_learning_rate_rises_again_after_each_restart(whole):
    kind, done = whole
    rates = [event["lr"] for event in done.of("step")]
    assert rates == ([0.02, 0.02, 0.01, 0.02, 0.01, 0.02] if kind == "relora" else [0.02] * STEPS)


def test_the_file_is_an_ordinary_lora(project, whole):
    kind, _ = whole
    read = load_adapter(project.output(kind))
    assert {update.kind for update in read.values()} == {"lora"}
    options = KINDS[kind]
    # After the last restart nothing was trained: three cycles, not four.
    assert {u.rank for u in read.values()} == {
        3 * options["rank"] if kind == "relora" else options["rank"]
    }
    assert ("menma.tlora" in read.metadata) == (kind == "tlora")
    merged = f"{kind}-merged.safetensors"
    events = project.job(
        "merge",
        base="models/transformer.safetensors",
        loras=[{"path": str(project.output(kind))}],
        output=merged,
    )
    warned = [event["message"] for event in events.of("warning")]
    assert bool(warned) == (kind == "tlora")
    assert all("all ranks act at every timestep" in message for message in warned)


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_goes_on_bit_for_bit_from_any_phase(project, whole, at):
    kind, _ = whole
    name = f"{kind}-{at}"
    start = project.run(kind).checkpoints / f"step-{at:08d}"
    done = project.train(name, resume=str(start), **adapter(kind), distributed__engine="local")
    assert [event["step"] for event in done.of("step")] == list(range(at + 1, STEPS + 1))
    one, other = held(project, kind), held(project, name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    ours, theirs = load_file(project.output(name)), load_file(project.output(kind))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    shutil.rmtree(project.run(name).root)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_same(project, whole, stage):
    kind, _ = whole
    name = f"{kind}-zero{stage}"
    refused = stage == 3 and kind in {"relora", "ggpo"}
    done = project.train(name, may_fail=refused, **adapter(kind), distributed__zero_stage=stage)
    if refused:
        assert done.code == 2
        assert "distributed.zero_stage" in done.words
        return
    ours, theirs = load_file(project.output(name)), load_file(project.output(kind))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
    if kind == "ggpo":
        norms = {k: v for k, v in held(project, name).items() if k.endswith("_norms_O")}
        assert len(norms) == 2 * len(load_adapter(project.output(name)))
        for key, value in held(project, kind).items():
            if key in norms:
                assert value.min() > 0
                torch.testing.assert_close(norms[key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "word"),
    [
        ("tlora", {"adapter__full_rank_below": 60.0}, "full_rank_below"),
        ("singlora", {"adapter__ramp_steps": 5}, "ramp_steps"),
        ("vera", {"adapter__projection_seed": 1}, "projection_seed"),
    ],
)
def test_what_the_weights_mean_cannot_change_on_the_way(project, kind, changes, word):
    first = f"{kind}-facts"
    short = {"training__max_steps": 1, "sampling__every_steps": 0, "distributed__engine": "local"}
    project.train(first, **adapter(kind), **short)
    changed = adapter(kind) | short | {"training__max_steps": 2} | changes
    done = project.train(first, may_fail=True, **changed)
    assert done.code == 2, done
    assert word in done.words
