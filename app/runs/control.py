"""Ask a run to save, to sample, to stop; make it end when it does not."""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from pathlib import Path

from app.runs.follow import Event, tail_events
from app.runs.processes import ProcessId, boot_id, end_tree, same_boot
from app.runs.status import Status, read_status
from trainer.contract.run_dir import Request, RunDir, answer_request

GRACE_S = 10.0
"""How long a trainer has to leave after it was told to end now."""


class Urgency(IntEnum):
    """How hard a stop is meant."""

    SAVE = 1
    """Finish the step, save a checkpoint, end."""
    NOW = 2
    """End without saving; killed when it takes longer than `GRACE_S`."""
    KILL = 3
    """Kill the whole process group at once."""


def request_once(run: RunDir, what: Request) -> None:
    """Write a request unless the same one still waits for its answer."""
    if all(pending != what for _, pending in run.pending_requests()):
        run.request(what)


def stop(run: RunDir, urgency: Urgency, *, grace_s: float = GRACE_S) -> None:
    """Stop a living run, orphaned or not.

    `SAVE` leaves a request and returns. `NOW` goes by the supervisor; without one it waits up to
    `grace_s` and kills what is left. `KILL` returns at once.
    """
    request_once(run, "stop")
    if urgency is Urgency.SAVE:
        return
    status = read_status(run)
    if status is None:
        return
    if urgency is Urgency.KILL:
        kill_trainer(status)
    elif os.name != "nt" and status.supervisor.is_alive():
        os.kill(status.supervisor.pid, signal.SIGTERM)
    elif status.trainer is not None and same_boot(status.boot_id, boot_id()):
        end_tree(status.trainer, kill=False)
        if not _gone(status.trainer, grace_s):
            kill_trainer(status)
            _gone(status.trainer, GRACE_S)


def kill_trainer(status: Status) -> None:
    """Kill the trainer's process group, if it is still the one that was started."""
    if status.trainer is not None and same_boot(status.boot_id, boot_id()):
        end_tree(status.trainer, kill=True)


def stop_pending(run: RunDir) -> float | None:
    """Return when an unanswered stop was asked for, or None."""
    for path, what in run.pending_requests():
        if what == "stop":
            return int(path.name.partition("-")[0]) / 1e9
    return None


def refuse_pending(run: RunDir, why: str) -> None:
    """Answer what nobody will answer any more."""
    for path, _ in run.pending_requests():
        answer_request(path, error=why)


def has_stepped(run: RunDir, status: Status) -> bool:
    """Tell whether this start has made a step, so that saving has a point."""
    return any(event["type"] == "step" for event in events_of_start(run, status))


def events_of_start(run: RunDir, status: Status) -> list[Event]:
    """Return the last events of the start that `status` describes.

    Told from those of earlier starts by their place in the log: a clock may be set back.
    """
    if status.events_from is not None and _size(run.events) >= status.events_from:
        return tail_events(run.events, start=status.events_from)
    return [e for e in tail_events(run.events) if e.get("time", 0) >= status.started - 1]


def size_since_start(run: RunDir, status: Status) -> int:
    """Return the bytes of the event log that this start has written, or all of them."""
    size = _size(run.events)
    return size - status.events_from if status.events_from and size > status.events_from else size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _gone(process: ProcessId, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while process.is_alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
