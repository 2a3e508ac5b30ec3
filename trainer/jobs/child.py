"""Running a job in a process of its own, as the app does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.contract.errors import RunError
from trainer.contract.files import write_json
from trainer.contract.options import Options
from trainer.jobs.base import Emit


def run_job(
    name: str, request: Options, request_file: Path, emit: Emit, *, threads: int | None = None
) -> dict[str, Any]:
    """Run a job, pass its events on, and return the fields of its last `end` event.

    Args:
        name: an entry of `contract.jobs.JOBS`.
        request: what it is asked for.
        request_file: where its request is written.
        emit: takes the job's events.
        threads: CPU threads it may use; None: torch's choice.

    Raises:
        RunError: it failed; its own words are on stderr.
    """
    write_json(request_file, request.model_dump(mode="json"))
    command = [sys.executable, "-m", "trainer", name, str(request_file)]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    end: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as job:
        assert job.stdout is not None
        try:
            for line in job.stdout:
                event = _event(line)
                if event is None:
                    sys.stderr.write(line)  # a library that prints where only events belong
                    continue
                fields = {key: value for key, value in event.items() if key not in _OWN}
                if event["type"] == "end":
                    end = fields
                emit(event["type"], **fields)
        except BaseException:
            job.terminate()
            raise
    if job.returncode:
        raise RunError(
            f"the job {name} failed (exit code {job.returncode})",
            hint=f"try it alone: {' '.join(command)}",
        )
    return end


def _event(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "type" in content else None


_OWN = frozenset({"v", "time", "type"})
"""Fields that the event codec adds itself."""
