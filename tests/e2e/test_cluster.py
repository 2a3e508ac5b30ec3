"""Training on two machines (network namespaces), and as tasks of srun and torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.project import Project, command, copy_project, environment, wait_until
from tests.e2e.two_machines import Pair, obstacle, two_machines
from tests.warm import start as warm
from trainer.engine.addresses import free_port

pytestmark = pytest.mark.slow
WHY_NOT = obstacle()
needs_namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
OPTIONS = ("--set", "distributed.engine=deepspeed", "--set", "distributed.timeout_s=120")
STEPS = ("--set", "training.max_steps=6", "--set", "checkpoint.every_steps=3")
ZERO = ("--set", "distributed.zero_stage=2")
ENDLESS = ("--set", "training.max_steps=100000")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with two_machines(tmp_path / "ssh") as pair:
        yield pair


@pytest.fixture
def open_project(project: Project) -> Project:
    """Return a project whose config leaves the number of processes open."""
    lines = project.config.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("num_processes")]
    project.config.write_text("\n".join(kept) + "\n")
    return project


def assert_same_output(one: Project, other: Project) -> None:
    ours, theirs = load_file(one.output), load_file(other.output)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def local(cached_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return what two processes of this machine train."""
    whole = copy_project(cached_project, tmp_path_factory.mktemp("local"))
    whole.done(
        "train", whole.config, *OPTIONS, *STEPS, *ZERO, "--set", "distributed.num_processes=2"
    )
    return whole


@needs_namespaces
def test_two_machines_train_what_two_processes_train(open_project, pair, local):
    hosts = pair.hostfile(open_project.folder)
    arguments = ("train", open_project.config, "--hostfile", hosts, *OPTIONS, *STEPS, *ZERO)
    outcome = pair.menma(open_project, *arguments)
    assert outcome.code == 0, f"{outcome}\n{open_project.run.console.read_text()}"
    assert_same_output(open_project, local)
    assert open_project.checkpoints() == local.checkpoints() == [3, 6]
    assert json.loads(open_project.run.environment.read_text())["world_size"] == 2
    # The supervisor ends after the run that it has written down as ended.
    wait_until(lambda: not pair.pids(pair.first) + pair.pids(pair.second), "everybody's end", 60)
    assert not list(open_project.run.root.glob(".seen-by-all-*"))


@needs_namespaces
def test_a_machine_that_dies_ends_the_run_which_then_goes_on(open_project, pair, tmp_path):
    hosts = pair.hostfile(open_project.folder)
    arguments = ("train", open_project.config, "--hostfile", hosts, *OPTIONS)
    often = ("--set", "checkpoint.every_steps=5")
    process = pair.start(open_project, *arguments, *ENDLESS, *often)
    try:
        wait_until(lambda: len(open_project.checkpoints()) >= 1, "a checkpoint")
        for pid in pair.pids(pair.second):
            with suppress(OSError):  # it has ended together with the one that was killed
                if b"trainer\0train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        _, words = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 1, words
    wait_until(lambda: not pair.pids(pair.first) + pair.pids(pair.second), "everybody's end", 60)
    console = open_project.run.console.read_text()
    assert f"{pair.second.address}: a process was ended by signal 9 (SIGKILL)" in console
    status = json.loads(open_project.run.status.read_text())
    assert status["exit_code"] == 128 + signal.SIGKILL

    # It goes on, and a stop reaches both machines.
    before = len(open_project.events("step"))
    process = pair.start(open_project, *arguments, *ENDLESS)
    try:
        wait_until(lambda: len(open_project.events("step")) >= before + 3, "steps")
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, words
    assert open_project.events("end")[-1]["reason"] == "stopped"
    assert open_project.events("phase")[-1]["step"] > 0
    assert open_project.checkpoints()[-1] == open_project.events("step")[-1]["step"]
    wait_until(lambda: not pair.pids(pair.first) + pair.pids(pair.second), "everybody's end", 60)


@needs_namespaces
def test_machines_that_do_not_share_the_run_directory_are_refused(open_project, pair, tmp_path):
    hidden = open_project.folder / "runs"
    hidden.mkdir(exist_ok=True)
    script = pair.ssh / "ssh"
    # The second machine has another disk where the first keeps its runs.
    line = script.read_text().replace("unshare --uts", "unshare --uts --mount")
    script.write_text(line.replace("; $*", f"; mount -t tmpfs none {tmp_path}/elsewhere; $*"))
    (tmp_path / "elsewhere").mkdir()
    elsewhere = ("--set", f"output.runs_dir={tmp_path}/elsewhere")
    hosts = pair.hostfile(open_project.folder)
    soon = ("--set", "distributed.timeout_s=50")
    options = (*OPTIONS, *STEPS, *elsewhere, *soon)
    arguments = ("train", open_project.config, "--hostfile", hosts, *options)
    outcome = pair.menma(open_project, *arguments)
    assert outcome.code == 2, outcome
    console = (tmp_path / "elsewhere" / "tiny" / "console.log").read_text()
    assert f"error: {pair.second.namespace} does not see {tmp_path}/elsewhere/tiny/" in console
    assert "Traceback" not in console
    wait_until(lambda: not pair.pids(pair.second), "the other machine's end", 60)


@needs_namespaces
@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="openssh-server is not installed")
def test_over_openssh(open_project, pair, tmp_path):
    server = pair.open_sshd(tmp_path / "sshd")
    hosts = pair.hostfile(open_project.folder)
    arguments = ("train", open_project.config, "--hostfile", hosts, *OPTIONS)
    process = pair.start(open_project, *arguments, *ENDLESS)
    try:
        wait_until(lambda: len(open_project.events("step")) >= 2, "two steps")
        assert len(pair.trainers(pair.second)) == 2  # the one that trains, and its starter
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=180)
        assert process.returncode == 130, words
        assert open_project.checkpoints() == [open_project.events("step")[-1]["step"]]
        assert pair.trainers(pair.second) == []

        # The launcher is gone without a word: sshd closes the other end.
        before = len(open_project.events("step"))
        process = pair.start(open_project, *arguments, *ENDLESS)
        wait_until(lambda: len(open_project.events("step")) >= before + 2, "two steps")
        os.kill(open_project.trainer_pid(), signal.SIGKILL)
        _, words = process.communicate(timeout=180)
        assert process.returncode == 1, words
        wait_until(lambda: not pair.trainers(pair.second), "the other machine's end", 60)

        # A machine that does not let us in is named.
        server.kill()
        outcome = pair.menma(open_project, *arguments, *ENDLESS)
        assert outcome.code == 1, outcome
        assert f"{pair.second.address} cannot be reached by ssh: ssh: connect" in outcome.words
    finally:
        process.kill()
        server.kill()


def tasks_of_srun(project: Project, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start two copies of the command as srun does."""
    common = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_PORT": str(free_port()),
    }
    return [
        warm.Popen(
            command(arguments),
            cwd=project.folder,
            env=environment() | common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for rank in ("0", "1")
    ]


def ends_of(tasks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    try:
        words = "\n".join(task.communicate(timeout=120)[1] for task in tasks)
    finally:
        for task in tasks:
            task.kill()
    return [task.returncode for task in tasks], words


def test_tasks_of_srun_are_one_run(open_project, local):
    arguments = ("train", str(open_project.config), *OPTIONS, *STEPS, *ZERO)
    codes, words = ends_of(tasks_of_srun(open_project, *arguments))
    assert codes == [0, 0], f"{words}\n{open_project.run.console.read_text()}"
    assert_same_output(open_project, local)
    assert [path.name for path in open_project.run.root.parent.iterdir()] == ["tiny"]
    # Started once more there is nothing to do, and no copy waits for another.
    codes, words = ends_of(tasks_of_srun(open_project, *arguments))
    assert codes == [0, 0], words


def test_a_sigterm_of_slurm_saves_and_ends_all_tasks(open_project):
    tasks = tasks_of_srun(open_project, "train", str(open_project.config), *OPTIONS, *ENDLESS)
    try:
        wait_until(lambda: len(open_project.events("step")) >= 2, "two steps")
    finally:
        for task in tasks:
            task.send_signal(signal.SIGTERM)
    codes, words = ends_of(tasks)
    assert codes == [130, 130], words
    assert open_project.checkpoints() == [open_project.events("step")[-1]["step"]]


def test_options_that_contradict_srun_are_refused(open_project):
    tasks = tasks_of_srun(open_project, "train", str(open_project.config), "--gpus", "2")
    codes, words = ends_of(tasks)
    assert codes == [2, 2]
    assert "--gpus: this is process 0 of 2 that srun or torchrun started" in words
    assert not open_project.run.root.exists()


@pytest.mark.parametrize("program", [pytest.param("trainer", marks=pytest.mark.long), "app"])
def test_torchrun_starts_the_processes(open_project, local, tmp_path, program):
    request = tmp_path / "request.json"
    settings = [text for text in (*OPTIONS, *STEPS, *ZERO) if text != "--set"]
    request.write_text(json.dumps({"config": str(open_project.config), "set": settings}))
    by_hand = [str(open_project.config), *OPTIONS, *STEPS, *ZERO]
    what = [str(request)] if program == "trainer" else by_hand
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port())]
    launcher += ["--master_addr", "127.0.0.1", "--nproc_per_node", "1", "--nnodes", "2"]
    nodes = [
        subprocess.Popen(
            [*launcher, "--node_rank", rank, "-m", program, "train", *what],
            cwd=open_project.folder,
            env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for rank in ("0", "1")
    ]
    codes, words = ends_of(nodes)
    assert codes == [0, 0], words
    assert_same_output(open_project, local)
