"""Mistakes that one kind of model allows: two experts, encoders, models without training."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest

from tests.e2e.variant_project import (
    VariantProject,
    base_config,
    draw_frames,
    random_transformer,
    write_clips,
    write_frame_folder,
    write_models,
    write_official,
)
from trainer.models.wan.tiny import write_tiny_vae

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


@pytest.mark.parametrize("missing", ["transformer", "vae", "text_encoder"])
def test_prompts_for_later_do_not_stop_a_run_that_cannot_sample(experts, missing):
    """Prompts alone ask for nothing: they are there for `menma sample`."""
    name = f"lacks-{missing}"
    prompts = [{"prompt": "a red field"}]
    done = without(experts, missing).train(name, sampling__prompts=prompts)
    assert done.of("end")[-1]["reason"] == "done"
    logged = [event["message"] for event in done.of("log")]
    assert any(f"model.{missing}" in message for message in logged), logged


@pytest.mark.parametrize("missing", ["transformer", "vae"])
def test_samples_that_are_asked_for_need_all_their_files(experts, missing):
    project = without(experts, missing)
    prompts = [{"prompt": "a red field"}]
    done = project.train("asked", may_fail=True, sampling__prompts=prompts, sampling__at_start=True)
    assert done.code == 2
    assert f"model.{missing}" in done.words
    assert not project.run("asked").root.exists(), "found before anything is started"


def test_prompts_for_later_are_drawn_when_asked(experts):
    run = experts.run("on-request")
    request = run.request("sample")
    done = experts.train("on-request", sampling__prompts=[{"prompt": "a red field"}])
    assert len(done.of("sample")) == 1
    assert request.with_suffix(".done").exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    return new_project(tmp_path_factory.mktemp("images"), "wan2.1-i2v-14b")


@pytest.mark.parametrize("variant", ["wan2.1-i2v-14b", "auto"])
@pytest.mark.parametrize("job", ["check", "cache", "sample"])
def test_a_missing_image_encoder_is_told_by_every_job(images, job, variant):
    project = without(images, "image_encoder")
    write_frame_folder(project.folder / "given", draw_frames(5, 1, 32, 32))
    config = project.write(model__variant=variant)
    prompts = [{"prompt": "a", "image": "given/0000.png"}]
    request = {"prompts": prompts} if job == "sample" else {}
    done = project.job(job, may_fail=True, config=config, **request)
    assert done.code == 2
    assert "model.image_encoder" in done.words


def test_check_tells_of_prompts_that_do_not_fit_the_model(images):
    wanted = {
        "sampling__every_steps": 1,
        "sampling__prompts": [{"prompt": "no image"}, {"prompt": "narrow", "width": 40}],
    }
    done = images.job("check", may_fail=True, config=images.write(**wanted))
    assert done.code == 2
    for key in ("prompts[0].image", "prompts[1].image", "prompts[1].width"):
        assert f"sampling.{key}" in done.words


def test_a_control_model_samples_and_is_not_trained_without_control_videos(tmp_path):
    project = new_project(tmp_path, "wan2.1-fun-control-1.3b")
    for job in ("check", "cache"):
        done = project.job(job, may_fail=True, config=project.write())
        assert done.code == 2
        told = done.words + "".join(str(event) for event in done.of("warning"))
        assert "has no control video, which this model is conditioned on" in told
        assert "control_directory" in told
    assert not list(tmp_path.glob("clips/menma_cache/*.safetensors"))

    write_frame_folder(tmp_path / "edges", draw_frames(7, 5, 32, 32))
    write_frame_folder(tmp_path / "other", draw_frames(8, 5, 32, 32))
    asked = [
        {"prompt": "a red field", "control": "edges"},
        {"prompt": "a red field", "control": "other"},
        {"prompt": "a red field", "control": "edges", "image": "other/0000.png"},
    ]
    prompts = [prompt | {"seed": 1} for prompt in asked]
    done = project.sample(prompts=prompts)
    assert len(done.of("sample")) == 3
    first, second, third = done.latents
    assert float((first - second).abs().max()) > 0.01, "the control video changes nothing"
    assert float((first - third).abs().max()) > 0.01, "the image changes nothing"

    refused = project.job("sample", may_fail=True, config="config.toml", prompts=[{"prompt": "a"}])
    assert refused.code == 2
    assert "control" in refused.words


def test_check_tells_of_files_that_do_not_belong_together(experts):
    write_tiny_vae(experts.folder / "models/wan22.safetensors", "2.2", base_dim=2)
    image_model = random_transformer("wan2.2-i2v-a14b", seed=3)
    other = write_official(image_model, experts.folder / "models/image_model")
    files = {"vae": "models/wan22.safetensors", "transformer": str(other)}
    config = experts.write(**{f"model__{key}": value for key, value in files.items()})
    done = experts.job("check", may_fail=True, config=config)
    assert done.code == 2
    assert "model.vae" in done.words
    assert "VAE 2.2" in done.words
    assert "model.transformer:" in done.words
    assert "wan2.2-i2v-a14b" in done.words

    swapped = experts.write(model__vae=experts.config["model"]["text_encoder"])
    done = experts.job("check", may_fail=True, config=swapped)
    assert done.code == 2
    assert "is not a Wan VAE" in done.words
