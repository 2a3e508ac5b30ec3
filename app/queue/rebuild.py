"""Make the queue's database anew from what its jobs have left on the disk."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.queue.adding import job_name
from app.queue.jobs import KINDS, LIGHT, Claim, Job, JobSpec, Outcome
from app.queue.look import look_at
from app.queue.store import FILE, QueueStore
from app.runs.state import find_runs
from app.runs.status import read_status
from trainer.contract.errors import DiskError
from trainer.contract.files import disk_errors
from trainer.contract.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What came back."""

    jobs: tuple[int, ...]
    """Numbers in the new database."""
    unreadable: tuple[Path, ...]
    """Folders that no job could be made of."""
    kept: Path | None = None
    """Where the database is that could not be read."""


def rebuild(folder: Path, runs_dirs: Sequence[Path]) -> Rebuilt:
    """Put the jobs back that the database does not have. Nothing is started by it.

    A job that was started comes back as what it is now; one that was claimed and never started
    comes back held. Jobs that only waited were in the database alone.

    Args:
        folder: of the queue; no worker may be at work in it.
        runs_dirs: folders of runs, for jobs whose own folder is gone as well.

    Raises:
        DiskError: the database cannot be written.
    """
    kept = _move_broken_aside(folder)
    store = QueueStore(folder)
    numbers, unreadable = [], []
    try:
        known = {job.claim.token for job in store.jobs() if job.claim is not None}
        for place in _folders(folder, runs_dirs):
            job = _job(place)
            if job is None:
                unreadable.append(place)
            elif job.claim is None or job.claim.token not in known:
                known |= {job.claim.token} if job.claim is not None else set()
                number = store.restore(job)
                numbers += [number] if number is not None else []
    finally:
        store.close()
    return Rebuilt(tuple(numbers), tuple(unreadable), kept)


def _folders(folder: Path, runs_dirs: Sequence[Path]) -> Iterator[Path]:
    """Yield the folders of jobs, then of the runs that jobs have started, the oldest first."""
    jobs = folder / "jobs"
    if jobs.is_dir():
        yield from sorted(filter(Path.is_dir, jobs.iterdir()), key=_number)
    for runs_dir in runs_dirs:
        for run in reversed(find_runs(runs_dir)):
            status = read_status(run)
            if status is not None and status.job:
                yield run.root.resolve()


def _number(place: Path) -> int:
    number = place.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def _job(place: Path) -> Job | None:
    """Return the job of a folder; None: its files do not say."""
    run = RunDir(place)
    try:
        content: dict[str, Any] = json.loads(run.command.read_text(encoding="utf-8"))
        argv = tuple(str(word) for word in content["argv"][1:])
        cwd, made = Path(content["cwd"]), float(content["time"])
        kind = KINDS[argv[0]]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    queued = content.get("queued") or {}
    default_gpus = 1 if kind.uses_gpu else 0
    spec = JobSpec(
        argv=tuple(word for word in argv if word != "--detach"),
        name=str(queued.get("name") or job_name(argv)),
        cwd=cwd,
        environment={str(k): str(v) for k, v in (queued.get("environment") or {}).items()},
        priority=int(queued.get("priority") or 0),
        gpus=_gpus(queued.get("gpus", default_gpus)),
    )
    number = int(content.get("job") or 0)
    job = Job(id=number, spec=spec, position=0, created=made)
    status = read_status(run)
    if status is None or not status.job:
        return _replaced(job, held=True)
    places = tuple(map(str, queued.get("devices") or ([] if kind.uses_gpu else [LIGHT])))
    claimed = _replaced(job, claim=Claim(status.job, place, status.started, places))
    view = look_at(claimed)
    if not view.state.has_ended:
        return claimed
    ended = (view.run.ended if view.run else None) or status.ended or time.time()
    return _replaced(claimed, outcome=Outcome(view.state, view.why, ended))


def _replaced(job: Job, *, held: bool = False, **changes: Any) -> Job:
    spec = replace(job.spec, held=True) if held else job.spec
    return replace(job, spec=spec, **changes)


def _gpus(value: Any) -> int | tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else int(value)


def _move_broken_aside(folder: Path) -> Path | None:
    """Rename a database that is none, with what belongs to it; return its new path."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        connection = sqlite3.connect(file)
        try:
            (words,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
        if words == "ok":
            return None
    except sqlite3.OperationalError as error:
        raise DiskError(f"the queue in {file} cannot be used: {error}") from error
    except sqlite3.DatabaseError:
        pass
    kept = file.with_name(f"{FILE}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    with disk_errors(kept):
        file.rename(kept)
        for end in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                file.with_name(FILE + end).rename(kept.with_name(kept.name + end))
    return kept
