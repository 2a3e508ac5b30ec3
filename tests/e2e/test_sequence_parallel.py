"""`distributed.sequence_parallel` by the real command: the run of one process, made by two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.e2e.project import Project
from trainer.sampling.video_io import read_video

pytestmark = pytest.mark.slow

SECTIONS = """
[[sampling.prompts]]
prompt = "a red field"
seed = 1

[[sampling.prompts]]
prompt = "waves of blue"
seed = 2

[validation]
split = 0.4
every_steps = 2
"""
SHARED = ("engine=deepspeed", "num_processes=2", "sequence_parallel=2", "zero_stage=2")


def train(project: Project, folder: str, *distributed: str, steps: int = 3) -> list[dict[str, Any]]:
    """Train into `folder`; return its events."""
    sets = [f"distributed.{setting}" for setting in distributed]
    sets += ["adapter.dropout=0", "sampling.every_steps=3", f"training.max_steps={steps}"]
    sets.append(f"output.runs_dir={folder}")
    arguments = [part for setting in sets for part in ("--set", setting)]
    project.done("train", project.config, *arguments)
    return [json.loads(line) for line in (project.folder / folder / "tiny/events.jsonl").open()]


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == kind]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_two_processes_that_share_clips_train_as_one(project: Project) -> None:
    with project.config.open("a") as file:
        file.write(SECTIONS)
    alone = train(project, "alone")
    shared = train(project, "shared", *SHARED)

    log = [event["message"] for event in of(shared, "log")]
    assert "2 processes share the tokens of each clip" in log
    for kind in ("step", "validation"):
        wanted = [event["loss"] for event in of(alone, kind)]
        found = [event["loss"] for event in of(shared, kind)]
        assert len(wanted) == 3  # validation: before the first step, after the second and the last
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    outputs = [
        project.folder / name / "tiny/output/tiny.safetensors" for name in ("alone", "shared")
    ]
    wanted, found = map(load_file, outputs)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=2e-3)
    # The same batches an epoch and a step, so the same facts.
    assert header(outputs[1])["menma.world_size"] == header(outputs[0])["menma.world_size"] == "1"

    paths = [[Path(event["path"]) for event in of(events, "sample")] for events in (alone, shared)]
    assert [path.name for path in paths[1]] == [path.name for path in paths[0]]
    assert len(paths[1]) == 2, "one file a prompt, made by both"
    for one, other in zip(*paths, strict=True):
        frames = [read_video(project.folder / path).frames.astype(int) for path in (one, other)]
        assert np.abs(frames[0] - frames[1]).mean() < 1

    two = train(project, "resumed", *SHARED, steps=2)
    assert [event["step"] for event in of(two, "step")] == [1, 2]
    both = train(project, "resumed")
    assert [event["step"] for event in of(both, "step")] == [1, 2, 3]
    assert of(both, "warning") == [], "one process goes on with the data of a group"
    np.testing.assert_allclose(
        [event["loss"] for event in of(both, "step")],
        [event["loss"] for event in of(alone, "step")],
        rtol=1e-5,
    )


def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(project: Project) -> None:
    def refused(command: str, *settings: str) -> str:
        sets = [part for s in settings for part in ("--set", f"distributed.{s}")]
        outcome = project.menma(command, project.config, *sets)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.words
        return outcome.words

    deepspeed = ("engine=deepspeed",)
    words = refused("check", *deepspeed, "num_processes=3", "sequence_parallel=2")
    assert "sequence_parallel: num_processes = 3 cannot be cut into groups of 2" in words
    # The variant has 12 heads, this file has 2.
    words = refused("check", *deepspeed, "num_processes=4", "sequence_parallel=4")
    assert "4 processes cannot share the 2 attention heads of this model evenly" in words
    assert "one of 1, 2" in words
    assert "the local engine" in refused("train", "num_processes=2", "sequence_parallel=2")
