"""Whoever is killed: no job is lost or run twice, nothing stays, and the state is told right."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from app_runs import ENVIRONMENT, wait_for
from test_queue_worker import DRIVER, FAKE_APP

from app.queue.jobs import JobSpec, JobState
from app.queue.look import job_run, look_at
from app.queue.store import QueueStore
from app.runs import control
from app.runs.processes import ProcessId
from app.runs.status import Status, read_status
from trainer.contract.run_dir import RunDir

ROUNDS = int(os.environ.get("MENMA_KILL_ROUNDS", "1"))
"""Of each victim; docs/reliability.md has the figures of 10."""


class Scene:
    """A training of the queue, its worker, and an app in a terminal that shows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.store = QueueStore(self.state / "menma" / "queue")
        self.environment = ENVIRONMENT | {"XDG_STATE_HOME": str(self.state), "TERM": "screen"}
        self.socket = folder / "tmux"
        spec = JobSpec(argv=("train", "fish", "steps"), name="fish", cwd=folder)
        self.number = self.store.add(spec)
        self.worker = self.start_worker()
        self.tmux("new-session", "-d", "-x", "80", "-y", "24", f"{sys.executable} -m app")
        self.wait_for_state(JobState.RUNNING)
        wait_for(lambda: "fish" in self.screen())

    def start_worker(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", DRIVER, str(self.store.folder), *FAKE_APP]
        return subprocess.Popen(command, env=self.environment, cwd=self.folder)

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self.socket), "-f", "/dev/null", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        return done.stdout

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    @property
    def status(self) -> Status:
        status = read_status(self.run)
        assert status is not None
        return status

    @property
    def run(self) -> RunDir:
        claim = self.store.job(self.number).claim
        assert claim is not None
        return job_run(claim)

    def seen(self) -> JobState:
        job = self.store.job(self.number)
        return JobState.QUEUED if job.claim is None else look_at(job).state

    def wait_for_state(self, state: JobState) -> None:
        wait_for(lambda: self.seen() is state)

    def processes(self) -> list[psutil.Process]:
        """Return all that work in this folder, but for the terminal's."""
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                if str(self.folder) in words and "tmux" not in words:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> None:
        self.tmux("kill-server")
        self.worker.kill()
        self.worker.wait()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[Callable[[], Scene]]:
    made: list[Scene] = []

    def make() -> Scene:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Scene(folder))
        return made[-1]

    yield make
    for scene in made:
        scene.end()


def kill(process: ProcessId | None) -> None:
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)


def kill_app(scene: Scene) -> None:
    os.kill(int(scene.tmux("list-panes", "-F", "#{pane_pid}")), signal.SIGKILL)


def kill_terminal(scene: Scene) -> None:
    os.kill(int(scene.tmux("display-message", "-p", "#{pid}")), signal.SIGKILL)


def kill_worker(scene: Scene) -> None:
    scene.worker.kill()
    scene.worker.wait()


VICTIMS: dict[str, tuple[Callable[[Scene], None], JobState]] = {
    "the app": (kill_app, JobState.RUNNING),
    "the terminal's server": (kill_terminal, JobState.RUNNING),
    "the worker": (kill_worker, JobState.RUNNING),
    "the supervisor": (lambda scene: kill(scene.status.supervisor), JobState.ORPHANED),
    "the trainer": (lambda scene: kill(scene.status.trainer), JobState.FAILED),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_whoever_is_killed_the_state_is_right_and_the_run_is_one(scenes, victim, number):
    scene = scenes()
    chance = random.Random(f"{victim} {number}")
    time.sleep(chance.uniform(0.0, 0.5))
    act, expected = VICTIMS[victim]
    step = look_at(scene.store.job(scene.number)).run.step
    act(scene)
    scene.wait_for_state(expected)
    if scene.worker.poll() is not None:
        scene.worker = scene.start_worker()
    if expected is JobState.FAILED:
        assert "signal 9" in look_at(scene.store.job(scene.number)).why
    else:
        wait_for(lambda: (look_at(scene.store.job(scene.number)).run.step or 0) > step)
        assert scene.seen() is expected, "it goes on"
        control.stop(scene.run, control.Urgency.SAVE)
        scene.wait_for_state(JobState.STOPPED)
    wait_for(lambda: scene.worker.poll() == 0)  # nothing is left to wait for
    assert scene.store.job(scene.number).outcome is not None
    assert len(list((scene.store.folder / "jobs").iterdir())) == 1, "it was started once"
    wait_for(lambda: not scene.processes())
