"""The worker: what it starts, what it leaves, and that killing it loses and repeats nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from app_runs import ENVIRONMENT, wait_for

from app.queue import devices, worker
from app.queue.jobs import CPU, LIGHT, Claim, Job, JobSpec, JobState
from app.queue.look import JobView, job_run, look_at, look_at_all
from app.queue.store import QueueStore
from app.queue.worker import Worker, ensure_worker, is_working, worker_lock
from app.runs import control
from app.runs.lock import RunLock
from app.runs.status import read_status
from trainer.contract.run_dir import RunDir

FAKE_APP = (sys.executable, str(Path(__file__).with_name("fake_app.py")))


class Queue:
    """A queue with a stand-in for `menma`, and what can be seen of it."""

    def __init__(self, folder: Path) -> None:
        self.cwd = folder / "work"
        self.cwd.mkdir()
        self.store = QueueStore(folder / "queue")
        self.gpus: list[dict] = []
        self.worker = Worker(self.store, lambda: self.gpus)

    def add(self, kind: str, name: str, mode: str = "quick", **options) -> int:
        options.setdefault("gpus", 0 if kind in {"merge", "lora"} else 1)
        spec = JobSpec(argv=(kind, name, mode), name=name, cwd=self.cwd, **options)
        return self.store.add(spec)

    def view(self, number: int) -> JobView:
        return next(view for view in look_at_all(self.store.jobs()) if view.job.id == number)

    def states(self) -> dict[int, JobState]:
        return {view.job.id: view.state for view in look_at_all(self.store.jobs())}

    def work(self, timeout_s: float = 240) -> None:
        """Turn until nothing is live or ready."""
        end = time.monotonic() + timeout_s
        while self.worker.turn():
            assert time.monotonic() < end, self.states()
            time.sleep(0.05)

    def turn_until(self, number: int, state: JobState) -> None:
        def reached() -> bool:
            self.worker.turn()
            return self.view(number).state is state

        wait_for(reached)

    def ran(self) -> list[str]:
        file = self.cwd / "ran.txt"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []

    def end_all(self) -> None:
        for job in self.store.jobs():
            for run in {RunDir(job.claim.folder), job_run(job.claim)} if job.claim else ():
                status = read_status(run)
                for process in (status.trainer, status.supervisor) if status else ():
                    if process is not None and process.is_alive():
                        with suppress(ProcessLookupError):
                            os.killpg(os.getpgid(process.pid), signal.SIGKILL)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch) -> Iterator[Queue]:
    monkeypatch.setattr(worker, "APP", FAKE_APP)
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    made = Queue(tmp_path)
    yield made
    made.end_all()


def gpu(index: int, free: float = 24.0) -> dict:
    return {"index": index, "name": "x", "vram_gib": 24.0, "vram_free_gib": free}


def test_a_chain_runs_in_order_with_a_run_in_the_middle(queue):
    names = [("cache", "a", "quick"), ("train", "b", "finish"), ("merge", "c", "quick")]
    specs = [
        JobSpec(argv=argv, name=argv[1], cwd=queue.cwd, gpus=0 if argv[0] == "merge" else 1)
        for argv in names
    ]
    cache, train, merge = queue.store.add_all(specs, chained=True)
    queue.turn_until(train, JobState.RUNNING)
    view = queue.view(train)
    assert view.run.root == queue.cwd / "runs/b"
    assert view.run.step is not None
    assert queue.view(merge).why == f"after {train}"
    queue.work()
    assert set(queue.states().values()) == {JobState.DONE}
    assert queue.ran() == ["a", "c"]
    assert "words of a" in (queue.store.job(cache).claim.folder / "console.log").read_text()


def test_a_failure_blocks_what_waits_for_it_and_nothing_else(queue):
    bad = queue.add("cache", "bad", "fail")
    after = queue.add("merge", "after", after=(bad,))
    other = queue.add("cache", "other")
    lost_run = queue.add("train", "run", "fail")
    queue.work()
    states = queue.states()
    assert states == {
        bad: JobState.FAILED,
        after: JobState.BLOCKED,
        other: JobState.DONE,
        lost_run: JobState.FAILED,
    }
    assert queue.view(bad).why == "exit code 1"
    assert queue.view(lost_run).why == "the loss is not a number"
    assert sorted(queue.ran()) == ["bad", "other"]


def test_a_command_that_cannot_start_fails_and_the_rest_goes_on(queue, tmp_path):
    spec = JobSpec(argv=("cache", "x", "quick"), name="x", cwd=tmp_path / "gone")
    gone, other = queue.store.add(spec), queue.add("cache", "other")
    queue.work()
    assert queue.states() == {gone: JobState.FAILED, other: JobState.DONE}
    assert "gone" in queue.view(gone).why


def test_one_job_at_a_time_on_a_cpu_and_light_ones_beside_it(queue):
    first, second = queue.add("cache", "first", "long"), queue.add("cache", "second", "long")
    light, other = queue.add("merge", "light", "long"), queue.add("merge", "other", "long")
    for number in (first, light):
        queue.turn_until(number, JobState.RUNNING)
    states = queue.states()
    assert (states[second], states[other]) == (JobState.QUEUED, JobState.QUEUED)
    assert queue.store.job(first).claim.devices == (CPU,)
    assert queue.store.job(light).claim.devices == (LIGHT,)


def test_gpus_are_given_out_once_and_jobs_see_only_theirs(queue):
    queue.gpus = [gpu(0), gpu(1), gpu(2, free=3.0), gpu(3)]
    one = queue.add("cache", "one", "long")
    three = queue.add("cache", "three", "long", gpus=3)
    late = queue.add("cache", "late", "long")
    third = queue.add("cache", "third", "long", gpus=("3",))
    queue.turn_until(one, JobState.RUNNING)
    queue.worker.turn()
    states = queue.states()
    assert states[three] is JobState.QUEUED, "GPU 2 is used by something else"
    assert states[late] is states[third] is JobState.QUEUED, "nothing overtakes it"
    wait_for(queue.ran)
    assert (queue.cwd / "ran.txt").read_text() == f"one 0 {queue.cwd}\n"
    queue.store.cancel(three)
    queue.turn_until(late, JobState.RUNNING)
    queue.turn_until(third, JobState.RUNNING)
    assert queue.store.job(late).claim.devices == ("1",)
    assert queue.store.job(third).claim.devices == ("3",)


def test_what_can_never_start_says_so(queue):
    queue.gpus = [gpu(0)]
    many, absent = queue.add("cache", "many", gpus=2), queue.add("cache", "absent", gpus=("4",))
    queue.work()
    assert queue.view(many).state is queue.view(absent).state is JobState.FAILED
    assert queue.view(many).why == "it wants 2 GPUs and there are 1"
    assert queue.view(absent).why == "there is no GPU 4"
    assert devices.environment(("0", "1")) == {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(("kind", "mode"), [("cache", "long"), ("train", "steps")])
def test_a_cancelled_job_that_runs_is_stopped(queue, kind, mode):
    number = queue.add(kind, "x", mode)
    queue.turn_until(number, JobState.RUNNING)
    queue.store.cancel(number)
    queue.work()
    assert queue.view(number).state is JobState.STOPPED
    queue.end_all()


def test_paused_nothing_starts(queue):
    queue.store.paused = True
    number = queue.add("cache", "x")
    assert not queue.worker.turn()
    assert queue.view(number).state is JobState.QUEUED
    queue.store.paused = False
    queue.work()
    assert queue.view(number).state is JobState.DONE


def test_a_claim_without_a_start_is_given_back_and_one_with_a_lock_is_not(queue):
    number = queue.add("cache", "x")
    folder = queue.store.folder / "jobs/1"
    lock = RunLock.acquire(RunDir(folder).lock)  # a worker between claim and start
    queue.store.claim(number, Claim("t", folder, time.time(), (CPU,)))
    assert queue.worker.turn()
    assert queue.view(number).state is JobState.STARTING
    assert not queue.ran()
    lock.release()  # it died
    queue.work()
    assert queue.ran() == ["x"]
    assert queue.view(number).state is JobState.DONE


def test_killed_supervisors_are_told_apart(queue):
    run, job = queue.add("train", "run", "steps"), queue.add("cache", "x", "long")
    queue.turn_until(run, JobState.RUNNING)
    status = read_status(job_run(queue.store.job(run).claim))
    os.kill(status.supervisor.pid, signal.SIGKILL)
    queue.turn_until(run, JobState.ORPHANED)
    assert queue.view(job).state is JobState.QUEUED, "its place is still taken"
    control.stop(job_run(queue.store.job(run).claim), control.Urgency.SAVE)
    queue.turn_until(run, JobState.STOPPED)
    queue.turn_until(job, JobState.RUNNING)
    own = read_status(RunDir(queue.store.job(job).claim.folder))
    os.kill(own.supervisor.pid, signal.SIGKILL)
    os.kill(own.trainer.pid, signal.SIGKILL)
    queue.turn_until(job, JobState.FAILED)
    assert queue.view(job).why == "trainer and supervisor were both killed"


def test_a_run_that_is_started_again_by_hand_is_not_taken_for_the_job(queue, runs):
    number = queue.add("train", "run", "finish")
    assert queue.worker.turn()
    wait_for(lambda: job_run(queue.store.job(number).claim).root == queue.cwd / "runs/run")
    wait_for(lambda: look_at(queue.store.job(number)).state is JobState.DONE)
    runs.folder = queue.cwd / "runs"
    runs.start("fail", "run")
    view = look_at(queue.store.job(number))
    assert view.state is JobState.LOST
    assert "started again" in view.why


def test_the_worker_ends_when_nothing_is_left_and_only_one_works(queue, monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.05)
    queue.add("cache", "x")
    worker.work(queue.store.folder)
    assert queue.ran() == ["x"]
    lock = RunLock.acquire(worker_lock(queue.store.folder))
    assert is_working(queue.store.folder)
    assert worker.main(["--folder", str(queue.store.folder)]) == 0, "another one is at work"
    lock.release()
    assert not is_working(queue.store.folder)


DRIVER = """
import sys
from app.queue import worker
worker.APP = tuple(sys.argv[2:])
worker.POLL_S = 0.02
sys.exit(worker.main(["--folder", sys.argv[1]]))
"""


@pytest.mark.slow
def test_workers_that_are_killed_lose_no_job_and_run_none_twice(queue):
    chance = random.Random(3)
    jobs = [queue.add("cache" if n % 2 else "merge", f"j{n}") for n in range(16)]
    command = [sys.executable, "-c", DRIVER, str(queue.store.folder), *FAKE_APP]
    kills = 0
    while kills < 60 and len(queue.ran()) < len(jobs):
        process = subprocess.Popen(command, env=ENVIRONMENT)
        time.sleep(chance.uniform(0.15, 0.6))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 5
    assert subprocess.run(command, env=ENVIRONMENT, timeout=400).returncode == 0
    assert Counter(queue.ran()) == {f"j{n}": 1 for n in range(16)}
    assert set(queue.states().values()) == {JobState.DONE}


def test_a_worker_in_the_background(queue, monkeypatch, tmp_path):
    monkeypatch.setenv("EMPTY", "")
    ensure_worker(queue.store.folder)  # nothing to do: it leaves
    wait_for(worker_lock(queue.store.folder).exists)  # it came
    wait_for(lambda: not is_working(queue.store.folder))
    assert (queue.store.folder / "worker.log").read_text() == ""


def test_jobs_are_plain_values(queue):
    job: Job = queue.store.job(queue.add("cache", "x"))
    assert look_at(job).to_json() | {"created": 0} == {
        "id": 1, "kind": "cache", "name": "x", "command": ["menma", "cache", "x", "quick"],
        "cwd": str(queue.cwd), "priority": 0, "gpus": 1, "after": [], "created": 0, "devices": [],
        "claimed": None, "folder": None, "state": "queued", "why": "", "run": None,
    }  # fmt: skip
