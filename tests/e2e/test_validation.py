"""Validation from a config to the log: the figure, who is held out, training left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.variant_project import (
    HEADS,
    Done,
    VariantProject,
    base_config,
    draw_frames,
    write_clips,
    write_frame_folder,
    write_models,
)
from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.contract.config import RunConfig, load_config
from trainer.contract.variants import VARIANTS
from trainer.data.entries import read_entry
from trainer.jobs.run_items import load_run_items, load_validation_items
from trainer.models import load_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.training.validation import item_noise

pytestmark = pytest.mark.slow

T2V = "wan2.1-t2v-1.3b"
WINDOWS = {"target_frames": [5], "frame_extraction": "uniform", "frame_sample": 2}
SPLIT = {"split": 0.4, "every_steps": 2, "seed": 1, "timesteps": [100, 700]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    """Return six clips of two windows each, of which three clips are held out."""
    folder = tmp_path_factory.mktemp("validation")
    model = write_models(folder, T2V, "comfy")
    for index in range(6):
        write_frame_folder(folder / f"clips/{index}", draw_frames(index, 9, 32, 32))
        (folder / f"clips/{index}.txt").write_text("a red field")
    source = {"video_directory": "clips", **WINDOWS}
    config = base_config(model, {"general": {"resolution": [32, 32]}, "sources": [source]})
    config["distributed"]["engine"] = "local"
    config["adapter"]["dropout"] = 0.1
    config["training"]["max_steps"] = 4
    config["validation"] = SPLIT
    project = VariantProject(folder, config)
    project.cache()
    return project


@pytest.fixture(scope="module")
def plain(project: VariantProject) -> Done:
    """A run of four steps that is validated before the first, after the second and the last."""
    return project.train("plain")


def loaded(project: VariantProject, name: str, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(project.folder)
    return load_config(f"{name}.toml")


def curve(done: Done) -> list[tuple[int, float, dict[str, float]]]:
    return [(e["step"], e["loss"], e["by_timestep"]) for e in done.of("validation")]


def trained_on(done: Done) -> set[str]:
    return {name for _, batch in done.steps for name in batch.names}


def by_hand(model: WanTransformer, config: RunConfig, timestep: float) -> float:
    """Return the mean squared error of the velocity, item by item, from the formula."""
    losses = []
    for item in load_validation_items(config, VARIANTS[T2V], "x.toml"):
        clean = read_entry(item.latents, item.latents_key)["latents"]
        context = read_entry(item.context, item.context_key)["context"]
        noise = item_noise(item, clean.shape, timestep, 0, config.validation.seed)
        sigma = timestep / 1000
        noisy = (1 - sigma) * clean + sigma * noise
        with torch.no_grad():
            velocity = model(noisy[None], torch.tensor([timestep]), [context])[0]
        difference = velocity.double() - (noise.double() - clean.double())
        losses.append(float(difference.square().mean()))
    return float(np.mean(losses))


def test_the_loss_is_what_a_plain_loop_over_the_formula_gives(project, plain, monkeypatch):
    config = loaded(project, "plain", monkeypatch)
    assert [step for step, _, _ in curve(plain)] == [0, 2, 4]
    model = load_transformer(config.model.transformer, config={"num_heads": HEADS})
    model.eval()
    for index in (0, 2):  # the base, and what was trained
        _, loss, by_timestep = curve(plain)[index]
        assert list(by_timestep) == ["100", "700"]
        for timestep, found in by_timestep.items():
            assert found == pytest.approx(by_hand(model, config, float(timestep)), rel=2e-5)
        assert loss == pytest.approx(np.mean(list(by_timestep.values())), rel=1e-9)
        attach(model, load_adapter(project.output("plain")))
    assert curve(plain)[2][1] < curve(plain)[0][1]


def test_no_window_of_a_clip_that_is_held_out_is_trained_on(project, plain, monkeypatch):
    config = loaded(project, "plain", monkeypatch)
    items = load_run_items(config, VARIANTS[T2V], "plain.toml")
    held = {item.name for item in items.validation}
    rest = {item.name for item in items.training.items}
    assert (len(held), len(rest)) == (6, 6)
    assert not {name.split(" [")[0] for name in held} & {name.split(" [")[0] for name in rest}
    assert trained_on(plain) <= rest
    assert plain.of("validation")[0]["items"] == 6


@pytest.mark.parametrize("engine", [("local", 0), ("deepspeed", 0), ("deepspeed", 3)])
def test_training_is_bit_for_bit_the_same_with_and_without(project, plain, engine):
    name = f"with-{engine[0]}-{engine[1]}"
    where = {"distributed__engine": engine[0], "distributed__zero_stage": engine[1]}
    every = 2 if engine[1] == 3 else 1  # DeepSpeed looks through all forwards for each release
    done = project.train(name, **where, validation=SPLIT | {"every_steps": every})
    without = project.train(name + "-off", **where, validation=SPLIT | {"every_steps": 0})
    assert len(done.of("validation")) == 4 // every + 1
    assert not without.of("validation")
    assert "6 items are held out of training and not measured" in str(without.of("log"))
    figures = ("loss", "grad_norm")
    assert [[e[key] for key in figures] for e in done.of("step")] == [
        [e[key] for key in figures] for e in without.of("step")
    ]
    ours, other = load_file(project.output(name)), load_file(project.output(name + "-off"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in ours.items())
    exact = [loss for step, loss, _ in curve(done) if step % 2 == 0]
    np.testing.assert_allclose(exact, [loss for _, loss, _ in curve(plain)], rtol=1e-4)


def test_batches_change_the_speed_only_and_more_noises_the_figure_a_little(project, plain):
    one = {"training__max_steps": 1}
    first = curve(plain)[0][1]
    batched = project.train("batched", **one, validation=SPLIT | {"batch_size": 4})
    assert curve(batched)[0][1] == pytest.approx(first, rel=1e-5)
    noisy = project.train("noisy", **one, validation=SPLIT | {"noises_per_timestep": 2})
    assert curve(noisy)[0][1] != pytest.approx(first, rel=1e-5)
    assert curve(noisy)[0][1] == pytest.approx(first, rel=0.1)
    other_seed = project.train("seed", **one, training__seed=7)
    assert curve(other_seed)[0][1] == first, "whatever training.seed is"


def test_a_resumed_run_has_the_same_curve(project, plain):
    project.run("again").request("stop")
    stopped = project.train("again", may_fail=True)
    assert stopped.code == 130
    assert [step for step, _, _ in curve(stopped)] == [0]
    resumed = project.train("again")  # its log holds both parts
    assert curve(resumed) == curve(plain)


def test_sources_of_their_own_leave_training_as_it_is_without_any(project):
    write_clips(project.folder / "other", 2, 5, 32, 32)
    own: dict[str, Any] = {"every_steps": 1, "max_items": 1, "timesteps": [900, 10]}
    own["sources"] = [{"video_directory": "other", "target_frames": [5]}]
    refused = project.train("own", may_fail=True, validation=own)
    assert refused.code == 2
    assert "other is not cached yet" in refused.words
    assert "menma cache own.toml" in refused.words
    project.cache(validation=own)
    done = project.train("own", validation=own)
    none = project.train("none", validation={})
    assert list(done.of("validation")[0]["by_timestep"]) == ["10", "900"]
    assert {event["items"] for event in done.of("validation")} == {1}
    ours, other = load_file(project.output("own")), load_file(project.output("none"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in ours.items())
    assert trained_on(done) == trained_on(none)
    assert not any(name.startswith("other") for name in trained_on(done))
    # The two that are drawn alike (0 and 1 of both folders) differ in length, so in content.
    assert not done.of("warning")
    copies = project.train(
        "copies", validation={**own, "sources": [{"video_directory": "clips", **WINDOWS}]}
    )
    (warning,) = copies.of("warning")  # cached already: as training clips
    assert "training clips" in warning["message"]


@pytest.mark.parametrize(
    ("variant", "expert", "timesteps"),
    [
        ("wan2.1-i2v-14b", None, ["100", "300", "500", "700", "900"]),
        ("wan2.2-ti2v-5b", None, ["100", "300", "500", "700", "900"]),
        ("wan2.2-i2v-a14b", "high_noise", ["900"]),
        ("wan2.2-t2v-a14b", "low_noise", ["100", "300", "500", "700"]),
    ],
)
def test_every_kind_of_model_is_validated(tmp_path, variant, expert, timesteps):
    model = write_models(tmp_path, variant, "comfy")
    if expert is not None:
        model["expert"] = expert
    size = (64, 32) if VARIANTS[variant].vae == "2.2" else (32, 32)
    write_clips(tmp_path / "clips", 3, 5, *size)
    dataset = {"general": {"resolution": list(size)}}
    dataset["sources"] = [{"video_directory": "clips", "target_frames": [5]}]
    config = base_config(model, dataset)
    config["distributed"]["engine"] = "local"
    config["training"]["max_steps"] = 1
    config["validation"] = {"split": 0.4, "every_steps": 1, "seed": 1, "batch_size": 3}
    project = VariantProject(tmp_path, config)
    project.cache()
    done = project.train("run")
    first, last = done.of("validation")
    assert list(first["by_timestep"]) == timesteps
    assert 0 < first["items"] < 3
    assert last["loss"] != first["loss"]
    said = " ".join(event["message"] for event in done.of("log"))
    assert ("the other expert works there" in said) == (expert is not None)


def test_images_are_held_out_like_clips(project):
    folder = project.folder / "images"
    for index in range(4):
        write_frame_folder(folder, draw_frames(30 + index, 1, 32, 32))
        (folder / "0000.png").rename(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a red field")
    own = {"dataset__sources": [{"image_directory": "images"}], "validation": SPLIT}
    project.cache(**own)
    done = project.train("images", **own)
    assert 0 < done.of("validation")[0]["items"] < 4
    assert len(trained_on(done)) == 4 - done.of("validation")[0]["items"]
