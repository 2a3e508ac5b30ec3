"""The files that trainings have written, to take away."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.domain.toml_text import toml_value
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


def sampling_command(output: Output, outputs: Sequence[Output]) -> list[str]:
    """Return the arguments of `menma` that sample with a file of a run, as it was at that step.

    Args:
        output: the file; with it, of a run that trains both experts, goes that of the other one.
        outputs: all files of all runs, the newest first.
    """
    run = output.run
    siblings = [other for other in outputs if other.run.root == run.root]
    if not siblings or _step_of(siblings[0]) == _step_of(output):
        return ["sample", str(run.root)]
    command = ["sample", str(run.config), "--output", str(run.root / "samples")]
    for file in (one.file for one in siblings if _step_of(one) == _step_of(output)):
        if _is_adapter_of(run):
            command += ["--lora", str(file)]
        else:
            key = "transformer_high_noise" if "high_noise" in file.stem else "transformer"
            command += ["--set", f"model.{key}={toml_value(str(file))}"]
    return command


def _step_of(output: Output) -> str:
    return output.file.stem.partition("-step")[2]


def _is_adapter_of(run: RunDir) -> bool:
    try:
        config = tomllib.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    adapter = config.get("adapter", {})
    return not isinstance(adapter, dict) or adapter.get("kind") != "none"
