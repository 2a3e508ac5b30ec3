"""Validation with the command: what is refused, what is shown, and several processes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.e2e.project import CAPTIONS, Project
from trainer.sampling.video_io import write_video

pytestmark = pytest.mark.slow

OWN = """
[validation]
every_steps = 2
batch_size = 2

[[validation.sources]]
video_directory = "other"
target_frames = [5]
"""


def add(project: Project, text: str) -> int:
    """Append to the config; return the line of its first key."""
    before = project.config.read_text()
    project.config.write_text(before + text)
    return len(before.splitlines()) + 3


def test_clips_of_their_own_are_checked_cached_measured_and_shown(project: Project) -> None:
    random = np.random.default_rng(1)
    for index, caption in enumerate(CAPTIONS):
        clip = project.folder / "other" / f"{index}.mp4"
        frames = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]
        write_video(clip, frames, 16)
        clip.with_suffix(".txt").write_text(caption)
    add(project, OWN)

    refused = project.menma("train", project.config)
    assert refused.code == 2
    assert "other is not cached yet" in refused.words
    assert "menma cache" in refused.words
    checked = project.done("check", project.config)
    assert "Clips: 3." in checked.words
    assert "Validation: 3 clips, 3 items." in checked.words
    assert "validation.sources[0] is not cached yet" in checked.words
    cached = project.done("cache", project.config)
    assert "clips: 3 encoded, 3 kept" in cached.words
    assert "not cached yet" not in project.done("check", project.config).words

    plain = ("--set", "adapter.dropout=0")
    trained = project.done(
        "train", project.config, *plain, "--set", "training.gradient_accumulation_steps=2"
    )
    assert "validation loss at step 2: " in trained.words
    curve = [(event["step"], event["loss"]) for event in project.events("validation")]
    assert [step for step, _ in curve] == [0, 2, 3]
    shown = project.done("runs", "show", "tiny").out
    assert f"validation  {curve[2][1]:.4f} at step 3" in shown
    told = json.loads(project.done("runs", "show", "tiny", "--json").out)["validation"]
    assert [(point["step"], point["loss"]) for point in told] == curve

    # Three items in batches of two are shared out unevenly, and ZeRO-3 needs both in each forward.
    two = ("engine=deepspeed", "num_processes=2", "zero_stage=3")
    sets = [part for key in two for part in ("--set", f"distributed.{key}")]
    project.done("train", project.config, *plain, *sets, "--set", "output.runs_dir=two")
    events = [json.loads(line) for line in (project.folder / "two/tiny/events.jsonl").open()]
    both = [event for event in events if event["type"] == "validation"]
    assert [event["items"] for event in both] == [3, 3, 3]
    np.testing.assert_allclose([e["loss"] for e in both], [loss for _, loss in curve], rtol=1e-4)


def test_a_split_that_holds_out_the_only_clip_is_named_with_its_line(project: Project) -> None:
    for clip in sorted((project.folder / "clips").glob("*.mp4"))[1:]:
        clip.unlink()
    project.done("cache", project.config)
    line = add(project, "\n[validation]\nsplit = 0.5\nevery_steps = 1\n")
    checked = project.menma("check", project.config)
    assert checked.code == 2
    assert (
        f"tiny.toml:{line}: validation.split: holds out the only clip of the dataset"
        in checked.words
    )
    refused = project.menma("train", project.config)
    assert refused.code == 2
    assert "validation.split = 0.5 holds out the only clip" in refused.words


def test_held_out_clips_are_counted_before_they_are_cached(project: Project) -> None:
    add(project, "\n[validation]\nsplit = 0.001\nevery_steps = 1\n")
    told = json.loads(project.done("check", project.config, "--json").out)
    assert (told["clips"], told["validation_clips"], told["validation_items"]) == (2, 1, 1)
    (project.folder / "clips/menma_cache/cache_index.json").unlink()
    again = json.loads(project.done("check", project.config, "--json").out)
    assert again == told
