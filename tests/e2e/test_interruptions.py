"""Runs that are killed or stopped go on exactly where they were."""

from __future__ import annotations

import os
import signal

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


@pytest.mark.parametrize(
    ("engine", "processes"), [("local", 1), ("deepspeed", 1), ("deepspeed", 2)]
)
def test_a_killed_run_resumes_bit_for_bit(project: Project, tmp_path, engine, processes):
    options = settings(engine, processes)
    whole = copy_project(project, tmp_path / "whole")
    whole.done("train", whole.config, *options)

    command = project.start("train", project.config, *options)
    wait_until(lambda: len(project.checkpoints()) >= 1, "a checkpoint")
    os.kill(project.trainer_pid(), signal.SIGKILL)
    _, words = command.communicate(timeout=120)
    assert command.returncode == 1, words
    killed_after = len(project.events("step"))
    assert 5 <= killed_after < STEPS, "the run was over before it could be killed"
    assert not project.output.exists()

    project.done("train", project.config, *options)
    starts = [event["step"] for event in project.events("phase") if event["name"] == "train"]
    assert len(starts) == 2
    assert 5 <= starts[1] <= killed_after
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
