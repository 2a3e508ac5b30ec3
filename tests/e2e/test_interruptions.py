"""Runs that are killed or stopped go on exactly where they were."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.project import Project, copy_project, wait_until

pytestmark = pytest.mark.slow
STEPS = 40


def settings(engine: str, processes: int) -> list[str]:
    return [
        *("--set", f"training.max_steps={STEPS}"),
        *("--set", "checkpoint.every_steps=5"),
        *("--set", f"distributed.engine={engine}"),
        *("--set", f"distributed.num_processes={processes}"),
    ]


def kill_when(project: Project, moment: Callable[[], object], what: str, *options: str) -> None:
    """Start or go on, and kill the trainer at that moment."""
    command = project.start("train", project.config, *options)
    wait_until(moment, what)
    os.kill(project.trainer_pid(), signal.SIGKILL)
    _, words = command.communicate(timeout=120)
    assert command.returncode == 1, words
    assert not project.output.exists(), "the run was over before it could be killed"


def losses(project: Project) -> dict[int, set[float]]:
    """Return every loss that was reported for a step: one, also where it was done again."""
    found: dict[int, set[float]] = {}
    for event in project.events("step"):
        found.setdefault(event["step"], set()).add(event["loss"])
    return found


@pytest.mark.parametrize(
    ("engine", "processes"),
    [("local", 1), pytest.param("deepspeed", 1, marks=pytest.mark.long), ("deepspeed", 2)],
)
def test_a_killed_run_resumes_bit_for_bit(project: Project, tmp_path, engine, processes):
    options = settings(engine, processes)
    whole = copy_project(project, tmp_path / "whole")
    whole.done("train", whole.config, *options)

    def saving() -> bool:
        begun = list(project.run.checkpoints.glob(".step-*.partial"))
        return len(project.checkpoints()) >= 1 and bool(begun)

    kill_when(project, saving, "a checkpoint that is being written", *options)
    # Of the steps that are left, not the last ones: it would be over before it can be killed.
    left = STEPS - project.checkpoints()[-1]
    chance = random.Random(f"{engine} {processes}").randint(1, max(1, min(left - 8, STEPS // 2)))
    seen = len(project.events("step"))
    moment = f"step {chance} after it"
    kill_when(project, lambda: len(project.events("step")) >= seen + chance, moment, *options)
    killed_after = max(losses(project))

    project.done("train", project.config, *options)
    starts = [event["step"] for event in project.events("phase") if event["name"] == "train"]
    assert len(starts) == 3
    assert 0 < starts[1] <= starts[2] <= killed_after < STEPS
    # A step's noise is its clips' own, so that equal losses are those of the same clips in order.
    assert losses(project) == losses(whole)
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    ours, theirs = load_file(project.output), load_file(whole.output)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_saves_and_leaves_with_130(project: Project):
    command = project.start("train", project.config, "--set", "training.max_steps=100000")
    wait_until(lambda: len(project.events("step")) >= 3, "three steps")
    command.send_signal(signal.SIGINT)
    _, words = command.communicate(timeout=120)
    assert command.returncode == 130, words
    done = project.events("step")[-1]["step"]
    assert project.checkpoints() == [done]
    project.done("train", project.config, "--set", f"training.max_steps={done + 2}")
    assert [event["step"] for event in project.events("step")] == list(range(1, done + 3))
    assert project.output.exists()


def test_a_run_outlives_the_command_that_started_it(project: Project):
    project.done("train", project.config, "--detach", "--set", "training.max_steps=100000")
    wait_until(lambda: len(project.events("step")) >= 1, "a step")
    project.done("runs", "stop", "tiny")
    wait_until(lambda: project.events("end"), "the end")
    assert project.events("end")[-1]["reason"] == "stopped"
    assert len(project.checkpoints()) == 1


def test_a_second_start_of_a_running_run_is_refused(project: Project):
    project.done("train", project.config, "--detach", "--set", "training.max_steps=100000")
    wait_until(lambda: len(project.events("step")) >= 1, "a step")
    second = project.menma("train", project.config)
    project.done("runs", "stop", "tiny")
    wait_until(lambda: project.events("end"), "the end")
    assert second.code == 3, second
