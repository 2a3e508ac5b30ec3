"""Runs and jobs as one list: what runs, what is next, what broke and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.queue.jobs import JobState
from app.queue.look import JobView, look_at_all
from app.queue.order import ordered
from app.queue.store import QueueStore
from app.runs.durations import duration
from app.runs.state import RunState, State, find_runs, read_state
from trainer.contract.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the list: a job, or a run that is of no job."""

    key: str
    """The same for as long as it is in the list."""
    kind: str
    name: str
    sign: str
    state: str
    why: str
    live: bool
    waits: bool = False
    job: JobView | None = None
    run: RunState | None = None

    @property
    def run_dir(self) -> RunDir | None:
        """The run directory of a training."""
        return RunDir(self.run.root) if self.run is not None and self.kind == "train" else None

    @property
    def step(self) -> str:
        """How far it is."""
        run = self.run
        if run is None or run.step is None:
            return ""
        return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)

    @property
    def eta(self) -> str:
        """How long it still takes."""
        return duration(self.run.eta_s) if self.live and self.run and self.run.eta_s else ""

    @property
    def loss(self) -> str:
        """The newest loss."""
        return f"{self.run.loss:.4f}" if self.run and self.run.loss is not None else ""

    @property
    def gpu(self) -> str:
        """The places that a job holds."""
        claim = self.job.job.claim if self.job else None
        return ",".join(claim.devices) if claim and self.live else ""


@dataclass(frozen=True, slots=True)
class Overview:
    """The list at this moment."""

    entries: tuple[Entry, ...]
    paused: bool = False
    problem: str = ""
    """Why the queue cannot be read; empty: it can."""

    @property
    def num_live(self) -> int:
        """How many trainings and jobs go on."""
        return sum(entry.live for entry in self.entries)


def read_overview(runs_dir: Path, store: QueueStore | None, problem: str = "") -> Overview:
    """Read the list: live ones, those that wait, then those that ended, the newest first.

    Args:
        runs_dir: folder of the runs.
        store: the queue; None where it cannot be opened.
        problem: why not.
    """
    views = ordered(look_at_all(store.jobs())) if store is not None else []
    jobs = [_of_job(view) for view in views]
    shown = {entry.run.root.resolve() for entry in jobs if entry.run is not None}
    runs = [
        _of_run(read_state(run)) for run in find_runs(runs_dir) if run.root.resolve() not in shown
    ]
    entries = [entry for entry in (*jobs, *runs) if entry.live]
    entries += [entry for entry in jobs if entry.waits]
    ended = [entry for entry in (*jobs, *runs) if not entry.live and not entry.waits]
    entries += sorted(ended, key=_ended_at, reverse=True)
    return Overview(tuple(entries), store.paused if store is not None else False, problem)


def _of_job(view: JobView) -> Entry:
    return Entry(
        key=f"job {view.job.id}",
        kind=view.job.spec.kind.name,
        name=view.job.spec.name,
        sign=view.state.sign,
        state=view.state.value,
        why=view.why,
        live=view.state.is_live,
        waits=not view.state.is_live and not view.state.has_ended,
        job=view,
        run=view.run,
    )


def _of_run(state: RunState) -> Entry:
    return Entry(
        key=f"run {state.root}",
        kind="train",
        name=state.name,
        sign=state.state.sign,
        state=state.state.value,
        why=state.why,
        live=state.state.is_live,
        run=state,
    )


def _ended_at(entry: Entry) -> float:
    if entry.job is not None and entry.job.job.outcome is not None:
        return entry.job.job.outcome.time
    run = entry.run
    return (run.ended or run.last_event or run.started or 0.0) if run is not None else 0.0


BAD = frozenset({JobState.BLOCKED.value, State.FAILED.value, State.LOST.value})
"""States that somebody should look at."""
