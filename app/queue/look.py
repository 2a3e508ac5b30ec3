"""What a job is doing, computed from the database and from what its processes left on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.queue.jobs import Claim, Job, JobState
from app.runs import lock
from app.runs.launch import LAUNCHED
from app.runs.state import RunState, State, read_state
from app.runs.status import read_status
from trainer.contract.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job as it is at this moment."""

    job: Job
    state: JobState
    why: str = ""
    run: RunState | None = None
    """The run that it started, or its own processes."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **self.job.to_json(),
            "state": self.state.value,
            "why": self.why,
            "run": self.run.to_json() if self.run else None,
        }


def look_at(job: Job) -> JobView:
    """Return what a job does; of one that waits, whether it is held back is not looked at."""
    if job.claim is None:
        waits = job.cancelled is None
        return JobView(job=job, state=JobState.QUEUED if waits else JobState.CANCELLED)
    run = job_run(job.claim)
    if job.outcome is not None:
        return JobView(
            job=job, state=job.outcome.state, why=job.outcome.why, run=_known(run, job.claim)
        )
    state = _state(run, job, job.claim)
    if state is None:
        return JobView(job=job, state=JobState.QUEUED, why="it was claimed and never started")
    return JobView(job=job, state=JobState(state.state.value), why=state.why, run=state)


def never_started(job: Job) -> bool:
    """Tell whether a claimed job has no process and never had one."""
    if job.claim is None or job.outcome is not None:
        return False
    return _state(job_run(job.claim), job, job.claim) is None


def look_at_all(jobs: list[Job]) -> list[JobView]:
    """Return what the jobs do, and of those that wait, what keeps them."""
    views = {job.id: look_at(job) for job in jobs}
    return [_waiting(view, views) for view in views.values()]


def job_run(claim: Claim) -> RunDir:
    """Return the run directory that a job's state is read from.

    It is the job's own folder, or the run that the job has started.
    """
    try:
        root = json.loads((claim.folder / LAUNCHED).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return RunDir(claim.folder)
    started = RunDir(Path(root))
    status = read_status(started)
    return started if status is not None and status.job == claim.token else RunDir(claim.folder)


def _state(run: RunDir, job: Job, claim: Claim) -> RunState | None:
    """Return the state of a claimed job; None when it was never started."""
    own = RunDir(claim.folder)
    status = read_status(own)
    if status is None and run.root == own.root:
        if lock.is_held(own.lock):
            return replace(read_state(own), state=State.STARTING, why="")
        return None
    state = read_state(run)
    if run.root != own.root:
        return state
    if state.state is State.STARTING and status and status.trainer and not job.spec.kind.starts_run:
        return replace(state, state=State.RUNNING)  # these commands write no events
    if state.state is State.DONE and (own.root / LAUNCHED).exists():
        why = "its run was started again, outside of the queue, before its end was seen"
        return replace(state, state=State.LOST, why=why)
    return state


def _known(run: RunDir, claim: Claim) -> RunState | None:
    status = read_status(run)
    if status is None or (run.root != claim.folder and status.job != claim.token):
        return None
    return read_state(run)


def _waiting(view: JobView, views: Mapping[int, JobView]) -> JobView:
    if view.state is not JobState.QUEUED or view.job.claim is not None:
        return view
    unmet = [n for n in view.job.spec.after if n not in views or not _is_done(views[n])]
    broken = [n for n in unmet if n not in views or _never_will(n, views, set())]
    if broken:
        names = ", ".join(str(number) for number in broken)
        return replace(view, state=JobState.BLOCKED, why=f"job {names} did not end well")
    if view.job.spec.held:
        return replace(view, state=JobState.HELD, why="until it is resumed")
    if unmet:
        return replace(view, why="after " + ", ".join(str(number) for number in unmet))
    return view


def _is_done(view: JobView) -> bool:
    return view.state is JobState.DONE


def _never_will(number: int, views: Mapping[int, JobView], seen: set[int]) -> bool:
    """Tell whether a job ended otherwise than done, or waits for such a one."""
    view = views.get(number)
    if view is None or number in seen:
        return True
    if view.state.has_ended:
        return not _is_done(view)
    waits = view.job.claim is None
    return waits and any(_never_will(n, views, seen | {number}) for n in view.job.spec.after)
