"""The demo does what it says: drawn clips, a base that learns its clip, a LoRA, a merge."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.jobs import DemoRequest
from trainer.demo import job
from trainer.demo.clips import DISC, NUM_FRAMES, SCENES, SIZE, SQUARE, draw, write_scene
from trainer.demo.configs import DemoConfig, write_config
from trainer.demo.job import DemoReport, run_demo
from trainer.demo.models import DemoModels, fit_vae
from trainer.sampling.video_io import read_video

GOOD = DemoReport(
    directory="demo",
    engine="local",
    base_loss_before=2.0,
    base_loss_after=0.1,
    base_likeness_before=0.0,
    base_likeness=0.95,
    likeness_of_the_clips=-0.5,
    lora_loss_before=5.0,
    lora_loss_after=0.3,
    lora_likeness_before=-0.5,
    lora_likeness=0.9,
    merge_difference=1e-6,
    files={},
    seconds=1.0,
)


def no_events(kind, /, **fields):
    """Take an event and drop it."""


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_clip_shows_its_shape_moving_as_the_caption_says(scene):
    frames = draw(scene)
    assert len(frames) == NUM_FRAMES
    centres = []
    for frame in frames:
        rows, columns = np.nonzero((frame == scene.colour).all(axis=-1))
        centres.append((rows.mean(), columns.mean()))
        assert (frame[0, 0] == scene.ground).all() or (frame[-1, -1] == scene.ground).all()
    down, right = np.diff(np.array(centres), axis=0).T
    moving, still = (right, down) if scene.moves == "right" else (down, right)
    assert (moving > 0.5).all()
    assert np.abs(still).max() < 0.5


def test_a_written_clip_is_what_was_drawn(tmp_path):
    clip = write_scene(DISC, tmp_path)
    assert clip.with_suffix(".txt").read_text().strip() == DISC.caption
    video = read_video(clip)
    assert video.frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
    # Colour is stored for 2 x 2 pixels, so only the edges of the shape differ.
    assert np.abs(video.frames.astype(int) - np.stack(draw(DISC))).mean() < 6


@pytest.mark.parametrize("full", [True, False])
def test_the_written_config_is_a_config(tmp_path, full):
    folder = tmp_path / 'a "quoted" folder'
    models = DemoModels(*(folder / name for name in ("t", "v", "e")))
    wanted = DemoConfig(
        name="base", transformer=folder / "t", scene=DISC, clips=folder, steps=7, full=full
    )
    config = load_config(write_config(tmp_path, models, wanted, seed=3))
    assert config.adapter.kind == ("none" if full else "lora")
    assert config.training.max_steps == 7
    assert config.model.vae == folder / "v"
    assert config.dataset.load().sources[0].video_directory == folder


def test_latents_of_the_fitted_vae_are_normalised():
    videos = torch.stack([job._as_video(draw(scene)) for scene in SCENES])
    seen = []
    vae = fit_vae(videos, 2, 0, lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        rows = vae.encode(videos).transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(1), torch.ones(16), atol=1e-4, rtol=0)
    assert seen == [(1, 2), (2, 2)]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_demo(tmp_path, no_events)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"base_likeness": 0.89}, ["not like its clip"]),
        ({"base_loss_after": 2.5}, ["base's loss"]),
        ({"lora_loss_after": 5.0}, ["LoRA's loss"]),
        ({"merge_difference": 1e-2}, ["differ"]),
    ],
)
def test_a_demo_that_did_not_work_says_so(change, words):
    failures = replace(GOOD, **change).failures
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))


def test_a_failed_measure_fails_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "run_demo", lambda *_: replace(GOOD, base_likeness=0.1))
    with pytest.raises(RunError, match="not like its clip"):
        job.run(DemoRequest(directory=tmp_path), no_events)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    events = []
    report = run_demo(tmp_path / "demo", lambda kind, /, **fields: events.append((kind, fields)))
    assert report.failures == []
    assert report.base_likeness >= 0.9
    assert report.base_likeness_before < 0.5
    assert report.likeness_of_the_clips < 0.5
    assert report.lora_loss_after < 0.5 * report.lora_loss_before
    assert report.lora_likeness > 0.8 > report.lora_likeness_before

    root = tmp_path / "demo"
    assert json.loads((root / "summary.json").read_text())["base_likeness"] == report.base_likeness
    sheet = np.asarray(Image.open(root / "contact_sheet.png"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100
    for path in report.files.values():
        assert (root / path).exists()
    square = read_video(root / "samples" / "with_lora.mp4").frames.astype(float)
    error = np.abs(square - np.stack(draw(SQUARE))).mean()
    other = np.abs(square - np.stack(draw(DISC))).mean()
    assert error < 0.5 * other
    assert [kind for kind, _ in events].count("end") >= 2
