"""The scheduler: starts what is ready, and only that. `python -m app.queue.worker [--stay]`.

One of it works at a time, under a lock. It may be killed at any moment: what it has started lives
under supervisors of its own, and its successor reads from their folders how far each job is.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from app.queue import devices
from app.queue.jobs import Claim, Job, JobState, Outcome
from app.queue.look import job_run, look_at, never_started
from app.queue.store import QueueStore, queue_folder
from app.runs import control, launch
from app.runs.child import child_environment
from app.runs.lock import RunLock, is_held
from app.runs.status import read_status
from trainer.contract.errors import BusyError, DiskError, MenmaError
from trainer.contract.files import write_json
from trainer.contract.run_dir import RunDir

POLL_S = 1.0
GPU_POLL_S = 5.0
APP: tuple[str, ...] = (sys.executable, "-m", "app")
ListGpus = Callable[[], list[dict[str, Any]]]


class Worker:
    """Brings the queue forward, one look at a time.

    Args:
        store: the jobs.
        list_gpus: returns this machine's GPUs as `domain.environment.gpus` does.
        clock: seconds, for tests.
    """

    def __init__(
        self, store: QueueStore, list_gpus: ListGpus, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._list_gpus = list_gpus
        self._clock = clock
        self._gpus: list[dict[str, Any]] = []
        self._looked = float("-inf")

    def turn(self) -> bool:
        """See what ended, start what is ready; return whether something is live or ready."""
        live = self._reconcile()
        ready = [] if self._store.paused else self._store.ready()
        if ready:
            self._start_ready(ready, live)
        return bool(live or ready)

    def _reconcile(self) -> list[Job]:
        """Write down what ended, give back what was never started; return what is live."""
        live = []
        for job in self._store.claimed():
            assert job.claim is not None
            if never_started(job):
                self._store.release(job.id, job.claim.token)
                continue
            view = look_at(job)
            if view.state.has_ended:
                outcome = Outcome(view.state, view.why, time.time())
                self._store.record(job.id, job.claim.token, outcome)
                continue
            if job.cancelled is not None:
                control.request_once(job_run(job.claim), "stop")
            live.append(job)
        return live

    def _start_ready(self, ready: Sequence[Job], live: Sequence[Job]) -> None:
        own = {place for job in live if job.claim for place in job.claim.devices}
        gpus, taken = self._places(own)
        overtaken = False
        for job in ready:
            why = devices.obstacle(job.spec, gpus)
            if why:
                self._refuse(job, why)
                continue
            # A job that waits for several GPUs is not overtaken for ever by those that want one.
            if overtaken and job.spec.gpus != 0:
                continue
            places = devices.pick(job.spec, gpus, taken)
            if places is None:
                overtaken = overtaken or job.spec.gpus != 0
                continue
            if self._start(job, places):
                taken.update(places)

    def _places(self, own: set[str]) -> tuple[list[str], set[str]]:
        """Return this machine's GPUs, and the places that are taken, by us or by others."""
        if self._clock() - self._looked > GPU_POLL_S:
            self._gpus, self._looked = self._list_gpus(), self._clock()
        used = {
            str(gpu["index"])
            for gpu in self._gpus
            if gpu["vram_free_gib"] < (1 - devices.IDLE_SHARE) * gpu["vram_gib"]
        }
        return [str(gpu["index"]) for gpu in self._gpus], own | used

    def _start(self, job: Job, places: tuple[str, ...]) -> bool:
        """Claim a job and start its supervisor; what goes wrong is the job's outcome."""
        token = uuid.uuid4().hex
        folder = self._store.folder / "jobs" / f"{job.id}-{token[:8]}"
        claim = Claim(token, folder, time.time(), places)
        run = RunDir(folder)
        lock = RunLock.acquire(run.lock)
        if not self._store.claim(job.id, claim):
            lock.release()
            return False
        try:
            launch_job(job, claim, run, lock)
        except (MenmaError, OSError) as error:
            if read_status(run) is None and not is_held(run.lock):
                self._store.record(job.id, token, Outcome(JobState.FAILED, str(error), time.time()))
        return True

    def _refuse(self, job: Job, why: str) -> None:
        claim = Claim(uuid.uuid4().hex, self._store.folder, time.time(), ())
        if self._store.claim(job.id, claim):
            self._store.record(job.id, claim.token, Outcome(JobState.FAILED, why, time.time()))


def launch_job(job: Job, claim: Claim, run: RunDir, lock: RunLock) -> None:
    """Start the command of a job under a supervisor in the job's folder.

    Raises:
        MenmaError: it did not start.
        OSError: its working folder is gone.
    """
    spec = job.spec
    arguments = [*spec.argv, *(["--detach"] if spec.kind.starts_run else [])]
    command = [*APP, *arguments]
    write_json(
        run.command,
        {
            "argv": ["menma", *spec.argv],
            "cwd": str(spec.cwd),
            "time": time.time(),
            "job": job.id,
            "queued": {  # what `menma queue rebuild` needs when the database is lost
                "name": spec.name,
                "priority": spec.priority,
                "gpus": spec.gpus,
                "environment": spec.environment,
                "devices": claim.devices,
            },
        },
    )
    launch.start(
        run,
        lock,
        command,
        cwd=spec.cwd,
        environment={
            **spec.environment,
            **devices.environment(claim.devices),
            launch.JOB_TOKEN: claim.token,
            launch.JOB_FOLDER: str(claim.folder),
        },
    )


def worker_lock(folder: Path) -> Path:
    """Return the lock of the worker of a queue."""
    return folder / "worker.lock"


def ensure_worker(folder: Path) -> None:
    """Start a worker in the background; one that finds another at work leaves at once."""
    ours = (launch.JOB_TOKEN, launch.JOB_FOLDER, "CUDA_VISIBLE_DEVICES")
    options: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        options = {
            "creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
        }
    environment = {k: v for k, v in child_environment().items() if k not in ours}
    with (folder / "worker.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "app.queue.worker", "--folder", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=folder,
            **options,
        )


def is_working(folder: Path) -> bool:
    """Tell whether a worker is there."""
    return bool(is_held(worker_lock(folder)))


def work(folder: Path, *, stay: bool = False) -> None:
    """Bring the queue forward until nothing is left to start or to wait for.

    Args:
        folder: of the queue.
        stay: go on waiting for jobs for ever.

    Raises:
        BusyError: another worker does it.
        DiskError: the queue cannot be read or written.
    """
    from app.domain.environment import gpus

    lock = RunLock.acquire(worker_lock(folder))
    store = QueueStore(folder)
    worker = Worker(store, gpus)
    try:
        while worker.turn() or stay:
            time.sleep(POLL_S)
    finally:
        # At once: a worker that was started for a job that came just now waits a moment for it.
        lock.release()
        store.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the worker's process."""
    parser = argparse.ArgumentParser(prog="python -m app.queue.worker", description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--stay", action="store_true")
    options = parser.parse_args(arguments)

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    with suppress(AttributeError, ValueError):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        work(options.folder or queue_folder(), stay=options.stay)
    except BusyError:
        return 0
    except DiskError as error:
        sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} menma queue worker: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
