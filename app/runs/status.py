"""`status.json`: what the supervisor saw. Facts with times, never a state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from app.runs.processes import ProcessId
from trainer.contract.files import write_json
from trainer.contract.run_dir import RunDir

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One start of a run, as its supervisor recorded it. Times are Unix seconds."""

    supervisor: ProcessId
    boot_id: str
    host: str
    started: float
    trainer: ProcessId | None = None
    stop_asked: float | None = None
    """When the first stop request or signal was noticed."""
    ended: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    """The signal that ended the trainer."""
    events_from: int | None = None
    """Bytes of the event log before this start: what comes later is of it, whatever the clock says.
    None: a supervisor of an older version wrote this."""
    job: str = ""
    """Token of the queue's job that this start belongs to; empty: none."""
    reason: str = ""
    """What the supervisor knows about a bad end, for people."""

    def write(self, run: RunDir) -> None:
        """Replace the run's `status.json` in one step."""
        write_json(
            run.status,
            {
                "v": VERSION,
                "supervisor": self.supervisor.to_json(),
                "trainer": self.trainer.to_json() if self.trainer else None,
                "boot_id": self.boot_id,
                "host": self.host,
                "started": self.started,
                "stop_asked": self.stop_asked,
                "ended": self.ended,
                "exit_code": self.exit_code,
                "signal": self.signal,
                "events_from": self.events_from,
                "job": self.job,
                "reason": self.reason,
            },
        )


def read_status(run: RunDir) -> Status | None:
    """Return the run's status, or None when there is none or it cannot be read."""
    try:
        content: Any = json.loads(run.status.read_text(encoding="utf-8"))
        supervisor = ProcessId.from_json(content["supervisor"])
        if supervisor is None:
            return None
        return Status(
            supervisor=supervisor,
            trainer=ProcessId.from_json(content.get("trainer")),
            boot_id=str(content["boot_id"]),
            host=str(content.get("host", "")),
            started=float(content["started"]),
            stop_asked=content.get("stop_asked"),
            ended=content.get("ended"),
            exit_code=content.get("exit_code"),
            signal=content.get("signal"),
            events_from=content.get("events_from"),
            job=str(content.get("job", "")),
            reason=str(content.get("reason", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
