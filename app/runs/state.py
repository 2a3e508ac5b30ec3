"""The state of a run, computed on every read from the lock, pids, `status.json` and the events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.runs import control, lock, processes
from app.runs.durations import duration
from app.runs.follow import SHORT_TAIL_BYTES, tail_events
from app.runs.printable import printable
from app.runs.status import Status, read_status
from trainer.contract.run_dir import RunDir

INTERRUPTED = 130
"""Exit code of a trainer that was told to end."""
EARLY_STEPS = 30
"""Before so many steps of a start, how long it still takes is not told."""
LARGEST = 1e300
"""Larger figures are damage."""
STALL_S = 300.0
STALL_STEPS = 10
"""A run counts as stalled after the longer of `STALL_S` and this many median step times."""


class State(StrEnum):
    """What a run is doing."""

    STARTING = "starting"
    RUNNING = "running"
    STALLED = "stalled"
    STOPPING = "stopping"
    ORPHANED = "orphaned"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"

    @property
    def is_live(self) -> bool:
        """Whether a trainer works, or will in a moment."""
        return self in _LIVE

    @property
    def sign(self) -> str:
        """One character, so that nothing depends on colour."""
        return _SIGNS[self]


_LIVE = {State.STARTING, State.RUNNING, State.STALLED, State.STOPPING, State.ORPHANED}
_SIGNS = {
    State.STARTING: ">",
    State.RUNNING: ">",
    State.STALLED: "!",
    State.STOPPING: ">",
    State.ORPHANED: "!",
    State.DONE: "+",
    State.STOPPED: "-",
    State.FAILED: "x",
    State.LOST: "x",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run as it is at this moment."""

    name: str
    root: Path
    state: State
    why: str = ""
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    eta_s: float | None = None
    estimating: bool = False
    """Whether it has made too few steps to tell how long it still takes."""
    started: float | None = None
    ended: float | None = None
    last_event: float | None = None
    """Unix seconds of the newest event."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "path": str(self.root),
            "state": self.state.value,
            "live": self.state.is_live,
            "why": self.why,
            "step": self.step,
            "total_steps": self.total_steps,
            "loss": self.loss,
            "eta_s": self.eta_s if self.state.is_live else None,
            "started": self.started,
            "ended": self.ended,
            "last_event": self.last_event,
        }


def read_state(run: RunDir, *, now: float | None = None, boot: str | None = None) -> RunState:
    """Compute the state of a run.

    Args:
        run: the run directory.
        now: Unix seconds; the clock when None.
        boot: id of this boot; the machine's when None.
    """
    status = read_status(run)
    events = tail_events(run.events)
    state, why = _judge(
        run,
        status,
        events,
        now=time.time() if now is None else now,
        boot=processes.boot_id() if boot is None else boot,
    )
    step = _last(events, "step")
    end = _last(events, "end")
    early = state is State.RUNNING and status is not None and _is_early(run, status)
    return RunState(
        name=run.root.name,
        root=run.root,
        state=state,
        why=printable(why),
        step=_whole(step.get("step", end.get("step"))),
        total_steps=_whole(step.get("total_steps")),
        loss=_number(step.get("loss")),
        eta_s=None if early else _number(step.get("eta_s")),
        estimating=early,
        started=status.started if status else None,
        ended=status.ended if status and not state.is_live else None,
        last_event=events[-1].get("time") if events else None,
    )


def find_runs(runs_dir: Path) -> list[RunDir]:
    """Return the run directories in a folder, the one that changed last first."""
    if not runs_dir.is_dir():
        return []
    found = [path for path in runs_dir.iterdir() if is_run_dir(path)]
    return [RunDir(path) for path in sorted(found, key=_changed, reverse=True)]


def is_run_dir(path: Path) -> bool:
    """Tell whether a folder is a run directory."""
    run = RunDir(path)
    return any(file.is_file() for file in (run.status, run.events, run.command))


def _changed(path: Path) -> float:
    run = RunDir(path)
    return max(
        (file.stat().st_mtime for file in (run.status, run.events, run.command) if file.exists()),
        default=0.0,
    )


def _judge(
    run: RunDir, status: Status | None, events: Sequence[dict[str, Any]], *, now: float, boot: str
) -> tuple[State, str]:
    held = lock.is_held(run.lock)
    if status is None:
        if held:
            return State.STARTING, ""
        return _from_events(events, State.FAILED, "it was never started")
    recent = control.events_of_start(run, status)
    here = processes.same_boot(status.boot_id, boot)
    if held is None:
        held = here and status.ended is None and status.supervisor.is_alive()
    if held:
        if status.ended is not None:  # a new supervisor has the lock and has not written yet
            return State.STARTING, ""
        return _live(run, status, recent, now=now)
    if status.ended is not None:
        return _ended(status, recent)
    if here and status.trainer is not None and status.trainer.is_alive():
        return State.ORPHANED, "its supervisor is gone; it still trains and can be stopped"
    if not here:
        elsewhere = f", or it runs on {status.host}" if status.host != processes.host_name() else ""
        return _from_events(recent, State.LOST, f"the machine was restarted{elsewhere}")
    return _from_events(recent, State.FAILED, "trainer and supervisor were both killed")


def _live(
    run: RunDir, status: Status, recent: Sequence[dict[str, Any]], *, now: float
) -> tuple[State, str]:
    asked = status.stop_asked or control.stop_pending(run)
    if asked is not None:
        return State.STOPPING, f"asked {duration(now - asked)} ago"
    if not recent:
        return State.STARTING, ""
    known = (_number(event.get("step_time_s")) for event in recent)
    times = sorted(seconds for seconds in known if seconds)
    limit = max(STALL_S, STALL_STEPS * times[len(times) // 2]) if times else STALL_S
    silence = now - recent[-1].get("time", now)
    if silence > limit:
        return State.STALLED, f"nothing heard for {duration(silence)}"
    if not any(event["type"] == "step" for event in recent):
        return State.STARTING, _phase(recent)
    return State.RUNNING, ""


def _is_early(run: RunDir, status: Status) -> bool:
    """Tell whether this start has made too few steps for a rate: the first ones are slow."""
    if control.size_since_start(run, status) > SHORT_TAIL_BYTES:
        return False
    kinds = [event["type"] for event in control.events_of_start(run, status)]
    return kinds.count("step") < EARLY_STEPS


def _ended(status: Status, recent: Sequence[dict[str, Any]]) -> tuple[State, str]:
    end = _last(recent, "end")
    reason = end.get("reason")
    if status.exit_code == 0:
        return (State.STOPPED if reason == State.STOPPED else State.DONE), ""
    error = str(_last(recent, "error").get("message", ""))
    if status.exit_code == INTERRUPTED or (status.stop_asked is not None and not error):
        return State.STOPPED, "" if reason == State.STOPPED else "ended without saving"
    code = f"exit code {status.exit_code}" if status.exit_code is not None else ""
    return State.FAILED, status.reason or error or str(end.get("message", "")) or code


def _from_events(events: Sequence[dict[str, Any]], otherwise: State, why: str) -> tuple[State, str]:
    """Judge by the trainer's own last word, which outlives a killed supervisor."""
    end = _last(events, "end")
    reason = end.get("reason")
    if reason in {State.DONE, State.STOPPED}:
        return State(reason), ""
    if reason == State.FAILED:
        return State.FAILED, str(_last(events, "error").get("message", ""))
    return otherwise, why


def _phase(events: Sequence[dict[str, Any]]) -> str:
    phase = _last(events, "phase")
    return str(phase.get("name", ""))


def _last(events: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((event for event in reversed(events) if event["type"] == kind), {})


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _number(value: Any) -> float | None:
    """Return a finite number; None for what a damaged log has instead."""
    known = isinstance(value, int | float) and abs(value) < LARGEST
    return float(value) if known else None
