"""The recipe from nothing to models: stages that are done stay done, and go on where they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.nano.readings import words_of
from trainer.clipart.scenes import TRIGGER, UNCAPTIONED
from trainer.clipart.split import TRAINED
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import JOBS
from trainer.contract.options import Options
from trainer.contract.variants import TransformerConfig
from trainer.models import (
    load_image_encoder,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.nano import recipe as recipe_module
from trainer.nano import text_training, vae_training
from trainer.nano.configs import CLIP_KINDS, Training, write_config
from trainer.nano.files import FILES, MAX_BYTES, QUALITY
from trainer.nano.recipe import Plan, Recipe, widened_for_images
from trainer.nano.vae_training import Phase, VAEFit
from trainer.sampling.video_io import read_video

STAGES = ["text_encoder", "vae", "clips", "t2v_first", "t2v_second", "t2v", "low_noise"]
STAGES += ["high_noise", "i2v", "export"]
PLAN = Plan(
    num_clips=12,
    text_steps=3,
    vae_steps=4,
    t2v_first_steps=3,
    t2v_second_steps=3,
    t2v_steps=3,
    low_noise_steps=2,
    high_noise_steps=2,
    i2v_steps=2,
    num_samples=1,
)
Events = list[tuple[str, dict[str, Any]]]


class Interruption(Exception):
    """Somebody pulled the plug."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fits be short in everything that no plan says."""
    finished = VAEFit.finished
    monkeypatch.setattr(VAEFit, "finished", lambda fit: finished(fit, num_clips=2))
    monkeypatch.setattr(vae_training, "PHASES", (Phase(1.0, 1, 16, 2),))
    monkeypatch.setattr(text_training, "_NUM_CAPTIONS", 400)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run jobs in this process, and return the list of those that were run."""
    run: list[str] = []

    def run_here(
        name: str, request: Options, request_file: Path, emit: Any, *, threads: int | None
    ) -> None:
        run.append(name)
        JOBS.load(name)(request, emit)  # type: ignore[operator]

    monkeypatch.setattr(recipe_module, "run_job", run_here)
    return run


def recording(events: Events, stop: Callable[[dict[str, Any]], bool] = lambda _: False) -> Any:
    def emit(kind: str, /, **fields: Any) -> None:
        events.append((kind, fields))
        if stop(fields):
            raise Interruption

    return emit


def begun(events: Events) -> list[str]:
    """Return the stages that were entered and not skipped."""
    return [
        fields["name"]
        for kind, fields in events
        if kind == "phase" and fields.get("name") in STAGES and set(fields) == {"name"}
    ]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_another_plan_does_not_take_over_a_folder(tmp_path):
    Recipe(tmp_path, PLAN, recording([]))._claim()
    Recipe(tmp_path, PLAN, recording([]))._claim()
    before = (tmp_path / "plan.json").read_bytes()
    for other in (replace(PLAN, seed=1), replace(PLAN, t2v_steps=4)):
        with pytest.raises(ConfigError, match="other numbers of steps") as caught:
            Recipe(tmp_path, other, recording([])).run()
        assert "--work" in str(caught.value.hint)
    assert (tmp_path / "plan.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_interrupted_vae_goes_on_with_the_steps_that_are_left(small, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "_SAVE_EVERY", 1)
    whole = Recipe(tmp_path / "whole", PLAN, recording([]))
    figures = whole.vae()

    first = Recipe(tmp_path / "parts", PLAN, recording([], lambda fields: fields["done"] == 3))
    with pytest.raises(Interruption):
        first.vae()
    assert not (tmp_path / "parts" / "models" / "vae.safetensors").exists()
    events: Events = []
    assert Recipe(tmp_path / "parts", PLAN, recording(events)).vae() == figures
    assert [fields["done"] for _, fields in events] == [4]
    one, other = (tmp_path / name / "models" / "vae.safetensors" for name in ("whole", "parts"))
    expected, found = load_file(one), load_file(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_vae(one).config == load_vae(other).config


def test_a_vae_interrupted_after_its_last_step_is_still_written(small, tmp_path):
    first = Recipe(tmp_path, PLAN, recording([], lambda fields: fields["done"] == 4))
    with pytest.raises(Interruption):
        first.vae()
    Recipe(tmp_path, PLAN, recording([])).vae()
    assert load_vae(tmp_path / "models" / "vae.safetensors").version == "2.1"


def test_clips_and_captions_are_of_the_trained_part(tmp_path):
    work = Recipe(tmp_path, replace(PLAN, num_clips=30), recording([]))
    work.clips()
    captions = []
    for kind in CLIP_KINDS:
        clips = sorted((tmp_path / "clips" / kind.name).glob("*.mp4"))
        assert len(clips) == round(30 * kind.share)
        frames = read_video(clips[0]).frames
        assert frames.shape == (kind.num_frames, kind.height, kind.width, 3)
        captions += [clip.with_suffix(".txt").read_text().strip() for clip in clips]
    told = [caption for caption in captions if caption != UNCAPTIONED]
    assert 0 < len(told) < len(captions)
    for caption in told:
        (colour,), (shape,), (direction,) = words_of(caption)
        assert (colour, shape, direction) in TRAINED
        assert TRIGGER not in caption


def test_clips_are_a_function_of_the_seed(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        Recipe(tmp_path / name, replace(PLAN, num_clips=2, seed=seed), recording([])).clips()
    kind = CLIP_KINDS[0].name
    content = {
        name: read_video(tmp_path / name / "clips" / kind / "00000.mp4").frames.astype(float)
        for name in ("one", "again", "other")
    }
    # The encoder's threads do not give the same bits each time, but much the same picture.
    assert np.abs(content["one"] - content["again"]).mean() < 1
    assert np.abs(content["one"] - content["other"]).mean() > 5


@pytest.mark.parametrize("folder", ["plain", 'with "quotes" and ümläuts'])
def test_written_configs_are_configs(tmp_path, folder):
    training = Training(
        name="t2v",
        model={"variant": "wan2.1-t2v-1.3b", "transformer": "t.safetensors"},
        steps=30,
        learning_rate=1e-3,
        objective={"preserve_distribution_shape": True},
    )
    root = tmp_path / folder
    config = load_config(write_config(root, root / "clips", CLIP_KINDS, training, 5))
    assert config.adapter.kind == "none"
    assert (config.training.max_steps, config.training.seed) == (30, 5)
    assert config.lr_schedule.warmup_steps == 3
    assert config.objective.preserve_distribution_shape
    assert config.run_dir == root / "runs" / "t2v"
    sources = config.dataset.load().sources
    assert [source.video_directory for source in sources] == [
        root / "clips" / kind.name for kind in CLIP_KINDS
    ]


@pytest.fixture
def base() -> WanTransformer:
    config = TransformerConfig(
        dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, freq_dim=16, text_len=8
    )
    transformer = WanTransformer(config, seed=1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) / 20)
    return transformer


def test_the_widened_model_starts_with_what_the_base_predicts(base, tmp_path):
    wide = widened_for_images(base, seed=3)
    random = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 2, 4, 6, generator=random)
    context = torch.randn(2, 5, 16, generator=random)
    timestep = torch.tensor([20.0, 900.0])
    expected = base(latents, timestep, context)
    for size in (1, 10):
        found = wide(
            latents,
            timestep,
            context,
            extra_channels=size * torch.randn(2, 20, 2, 4, 6, generator=random),
            image_context=size * torch.randn(2, 257, 80, generator=random),
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    save_transformer(wide, tmp_path / "wide.safetensors")
    assert load_transformer(tmp_path / "wide.safetensors").variant_name == "wan2.1-fun-inp-1.3b"


def test_what_has_no_effect_yet_can_be_learned(base):
    wide = widened_for_images(base, seed=3)
    random = torch.Generator().manual_seed(2)
    wide(
        torch.randn(1, 16, 1, 4, 4, generator=random),
        torch.tensor([500.0]),
        torch.randn(1, 5, 16, generator=random),
        extra_channels=torch.randn(1, 20, 1, 4, 4, generator=random),
        image_context=torch.randn(1, 257, 80, generator=random),
    ).square().mean().backward()
    assert wide.patch_embedding.weight.grad[:, 16:].abs().max() > 0
    for block in wide.blocks:
        assert block.cross_attn.v_img.weight.grad.abs().max() > 0
        assert block.cross_attn.v_img.weight.abs().max() == 0


@pytest.mark.slow
def test_the_whole_recipe_interrupted_and_continued(small, jobs, tmp_path):
    events: Events = []
    stop_at_clips = recording(events, lambda fields: fields == {"name": "clips"})
    with pytest.raises(Interruption):
        Recipe(tmp_path, PLAN, stop_at_clips).run()
    assert begun(events) == STAGES[:3]
    assert jobs == []
    models = tmp_path / "models"
    first = times(models)
    assert set(first) == {"text_encoder.safetensors", "vae.safetensors"}

    events.clear()
    stop_at_high = recording(events, lambda fields: fields == {"name": "high_noise"})
    with pytest.raises(Interruption):
        Recipe(tmp_path, PLAN, stop_at_high).run()
    assert begun(events) == STAGES[2:8]
    assert jobs == ["cache", "train"] * 4
    second = times(models)
    assert first.items() <= second.items()

    events.clear()
    Recipe(tmp_path, PLAN, recording(events)).run()
    assert begun(events) == STAGES[7:]
    assert jobs == ["cache", "train"] * 6
    assert second["t2v.safetensors"] == times(models)["t2v.safetensors"]
    check_models(models)
    check_files(tmp_path / "assets")
    notes = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "done").iterdir()}
    assert set(notes) == set(STAGES)
    assert all(note["seconds"] >= 0 for note in notes.values())

    events.clear()
    last = times(models)
    Recipe(tmp_path, PLAN, recording(events)).run()
    assert begun(events) == []
    assert len(jobs) == 12
    assert times(models) == last


def check_models(models: Path) -> None:
    """See that the ordinary loaders take everything, and that it was trained."""
    variants = {
        "t2v": "wan2.1-t2v-1.3b",
        "low_noise": "wan2.2-t2v-a14b",
        "high_noise": "wan2.2-t2v-a14b",
        "i2v": "wan2.1-fun-inp-1.3b",
    }
    trained = {name: load_transformer(models / f"{name}.safetensors") for name in variants}
    assert {name: model.variant_name for name, model in trained.items()} == variants
    untrained = load_transformer(models / "untrained.safetensors")
    assert untrained.head.head.weight.abs().max() == 0
    heads = {name: model.head.head.weight for name, model in trained.items()}
    assert all(head.abs().max() > 0 for head in heads.values())
    # Each expert saw its own part of the timesteps.
    assert not torch.equal(heads["low_noise"], heads["high_noise"])
    assert load_vae(models / "vae.safetensors").version == "2.1"
    assert load_text_encoder(models / "text_encoder.safetensors").config.dim == 64
    assert load_image_encoder(models / "image_encoder.safetensors") is not None


def check_files(folder: Path) -> None:
    """See that everything is there to be shipped, and said what it is."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {*FILES.values(), QUALITY}
    assert sum(sizes.values()) <= MAX_BYTES
    told = json.loads((folder / QUALITY).read_text())
    assert told["plan"] == asdict(PLAN)
    assert set(told["seconds"]) == set(STAGES) - {"export"}
    figures = told["figures"]
    assert all(-10 < figures.pop(name) < 60 for name in list(figures) if name.endswith("_db"))
    assert set(figures) == {
        f"{name}_{attribute}"
        for name in ("t2v", "t2v_experts", "i2v")
        for attribute in ("colour", "shape", "direction")
    }
    assert set(figures.values()) <= {0.0, 1.0}
