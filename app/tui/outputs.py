"""The files that trainings have written, to take away."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from app.runs.durations import duration
from app.runs.state import find_runs
from trainer.contract.run_dir import RunDir

KIB = 2**10
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Output:
    """One file of a run."""

    file: Path
    run: RunDir
    num_bytes: int
    written: float

    @property
    def size(self) -> str:
        """Its size as people read it."""
        if self.num_bytes < MIB:
            return f"{self.num_bytes / KIB:,.1f} KiB"
        return f"{self.num_bytes / MIB:,.1f} MiB"

    @property
    def age(self) -> str:
        """How long ago it was written."""
        return f"{duration(time.time() - self.written)} ago"


def find_outputs(runs_dir: Path) -> list[Output]:
    """Return the files of all runs of a folder, the newest first."""
    found = []
    for run in find_runs(runs_dir):
        for file in run.output.glob("*.safetensors"):
            try:
                status = file.stat()
            except OSError:  # taken away just now
                continue
            found.append(Output(file, run, status.st_size, status.st_mtime))
    return sorted(found, key=lambda output: output.written, reverse=True)
