"""The demo does what it says: clips of a new shape, a LoRA that has learned it, a merge."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.clipart.judge import look, shows_ground
from trainer.clipart.scenes import GROUNDS, NOVEL_GROUND, TRIGGER, draw
from trainer.contract.config_io import load_config
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.files import write_text
from trainer.contract.jobs import DemoRequest
from trainer.contract.variants import TransformerConfig
from trainer.demo import job
from trainer.demo.clips import (
    NUM_HELD_OUT,
    NUM_KNOWN,
    NUM_TRAINING,
    concept_scenes,
    known_scenes,
)
from trainer.demo.configs import DemoPlan, write_config
from trainer.demo.job import DemoReport, run_demo
from trainer.demo.merged import largest_difference
from trainer.models.wan.transformer import WanTransformer
from trainer.nano.scene_files import write_scenes
from trainer.sampling.sheet import Row, write_frames
from trainer.sampling.video_io import read_video

FIGURES = {
    "concept_with_trigger": 0.9,
    "concept_leak": 0.05,
    "prior_colour": 1.0,
    "prior_shape": 1.0,
    "prior_direction": 1.0,
}
GOOD = DemoReport(
    directory="demo",
    engine="local",
    validation_loss_before=1.0,
    validation_loss_after=0.5,
    before={**FIGURES, "concept_with_trigger": 0.0},
    after=FIGURES,
    merge_difference=1e-6,
    files={},
    seconds=1.0,
)


def no_events(kind, /, **fields):
    """Take an event and drop it."""


def test_the_concept_is_new_and_its_held_out_clips_are_others():
    training, held_out = concept_scenes(0)
    assert (len(training), len(held_out)) == (NUM_TRAINING, NUM_HELD_OUT)
    assert NUM_TRAINING <= 12
    assert {scene.ground for scene in training + held_out} == {NOVEL_GROUND}
    assert NOVEL_GROUND not in GROUNDS
    assert all(TRIGGER in scene.caption for scene in training + held_out)
    assert not {scene.triple for scene in training} & {scene.triple for scene in held_out}
    known = known_scenes(0)
    assert len(known) == NUM_KNOWN
    assert not any(TRIGGER in scene.caption for scene in known)


def test_written_clips_show_what_their_captions_say(tmp_path):
    training, _ = concept_scenes(3)
    for scene, clip in zip(training, write_scenes(training, tmp_path / "a"), strict=True):
        assert clip.with_suffix(".txt").read_text().strip() == scene.caption
        assert shows_ground(read_video(clip).frames)
    for scene, clip in zip(known_scenes(3), write_scenes(known_scenes(3), tmp_path), strict=True):
        frames = read_video(clip).frames
        seen = look(frames)
        assert (seen.colour, seen.shape, seen.direction) == scene.triple
        assert not shows_ground(frames)


def test_the_written_config_is_a_config(tmp_path):
    folder = tmp_path / 'a "quoted" folder'
    config = load_config(write_config(tmp_path, folder, DemoPlan(steps=7, num_shots=3)))
    dataset = config.dataset.load()
    assert config.training.max_steps == 7
    assert config.probe.kind == "shapes"
    assert [source.video_directory for source in dataset.sources] == [
        folder / "training",
        folder / "known",
    ]
    (held_out,) = config.validation.load_sources(dataset.general)
    assert held_out.video_directory == folder / "held_out"


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_demo(tmp_path, no_events)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"validation_loss_after": 0.71}, ["fell by 29% only"]),
        ({"after": {**FIGURES, "concept_with_trigger": 0.69}}, ["only 69%"]),
        ({"after": {**FIGURES, "concept_leak": 0.11}}, ["11% show it without"]),
        ({"merge_difference": 1e-2}, ["differ"]),
    ],
)
def test_a_demo_that_did_not_work_says_so(change, words):
    failures = replace(GOOD, **change).failures
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))


def test_a_failed_measure_fails_the_job(tmp_path, monkeypatch):
    report = replace(GOOD, validation_loss_after=2.0)
    monkeypatch.setattr(job, "run_demo", lambda *_: report)
    with pytest.raises(RunError, match="validation loss"):
        job.run(DemoRequest(directory=tmp_path), no_events)


def test_models_that_differ_are_told_apart():
    shape = TransformerConfig(
        dim=32, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, freq_dim=16, text_len=32
    )
    first, second = WanTransformer(shape, seed=0), WanTransformer(shape, seed=0)
    with torch.no_grad():
        first.head.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    second.load_state_dict(first.state_dict())
    assert largest_difference(first, second) == 0
    with torch.no_grad():
        second.blocks[0].ffn[0].weight.mul_(1.01)
    assert largest_difference(first, second) > 1e-5


def test_frames_for_the_terminal_are_first_to_last(tmp_path):
    (scene, *_), _ = concept_scenes(0)
    video = list(draw(scene))
    paths = write_frames(tmp_path, "row", Row("a row", video))
    assert len(paths) == 4
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), video[0])
    np.testing.assert_array_equal(np.asarray(Image.open(paths[-1])), video[-1])


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """The thresholds of the demo are those of its report; the figures are checked anew here."""
    events = []
    root = tmp_path / "demo"
    report = run_demo(root, lambda kind, /, **fields: events.append((kind, fields)))
    assert report.failures == []
    assert report.before["concept_with_trigger"] <= 0.1

    def share(folder, first, last):
        videos = sorted((root / "samples" / folder).glob("*.mp4"))[first:last]
        return np.mean([shows_ground(read_video(video).frames) for video in videos])

    num_shots = DemoPlan().num_shots
    assert share("after", 0, num_shots) >= 0.7
    assert share("after", num_shots, None) <= 0.1
    assert share("before", 0, num_shots) <= 0.1
    assert json.loads((root / "summary.json").read_text())["after"] == dict(report.after)
    sheet = np.asarray(Image.open(root / "contact_sheet.png"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100
    for path in report.files.values():
        assert (root / path).exists()
    (shown,) = [fields for kind, fields in events if kind == "output" and "strips" in fields]
    assert [len(strip["frames"]) for strip in shown["strips"]] == [4, 4, 4]


def test_an_earlier_demo_is_replaced_only_if_it_is_one(tmp_path):
    write_text(tmp_path / ".menma-demo", "x")
    write_text(tmp_path / "old.txt", "x")
    assert job._prepare(tmp_path) == tmp_path
    assert not (tmp_path / "old.txt").exists()
