"""The folder of a run: names of its files, and requests to a running trainer.

Standard library only; trainer and app both read and write runs through this module.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract.files import write_json

Request = Literal["save", "sample", "stop"]
REQUESTS: tuple[Request, ...] = ("save", "sample", "stop")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside one run directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.toml"

    @property
    def command(self) -> Path:
        """The command line and environment, secrets masked."""
        return self.root / "command.json"

    @property
    def environment(self) -> Path:
        """Versions, GPUs, git, dataset fingerprint."""
        return self.root / "environment.json"

    @property
    def status(self) -> Path:
        """What the supervisor knows; the state is computed from it, never stored."""
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor as long as the run lives."""
        return self.root / "run.lock"

    @property
    def events(self) -> Path:
        """Event log."""
        return self.root / "events.jsonl"

    @property
    def console(self) -> Path:
        """Everything the trainer printed."""
        return self.root / "console.log"

    @property
    def control(self) -> Path:
        """Requests to the trainer, one file each."""
        return self.root / "control"

    @property
    def checkpoints(self) -> Path:
        """Training state, one folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def output(self) -> Path:
        """Files to take away."""
        return self.root / "output"

    @property
    def samples(self) -> Path:
        """Samples made during training."""
        return self.root / "samples"

    @property
    def peaks(self) -> Path:
        """Measured peak memory."""
        return self.root / "peaks.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard files."""
        return self.root / "tensorboard"

    def request(self, what: Request) -> Path:
        """Ask the trainer to do something at its next step; return the request's file."""
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
        path = self.control / name
        write_json(path, {"request": what, "time": time.time(), "pid": os.getpid()})
        return path

    def pending_requests(self) -> Iterator[tuple[Path, Request]]:
        """Yield requests not yet answered, oldest first; unreadable ones are answered as errors."""
        if not self.control.is_dir():
            return
        for path in sorted(self.control.glob("[0-9]*.json")):
            try:
                what = json.loads(path.read_text(encoding="utf-8"))["request"]
            except (ValueError, KeyError, TypeError, OSError) as error:
                answer_request(path, error=f"unreadable request: {error}")
                continue
            if what not in REQUESTS:
                answer_request(path, error=f"unknown request {what!r}")
                continue
            yield path, what


def answer_request(path: Path, *, error: str = "", **answer: Any) -> None:
    """Replace a request by its answer: `<name>.done` or `<name>.err` beside it."""
    target = path.with_suffix(".err" if error else ".done")
    write_json(target, {"error": error} if error else {"time": time.time(), **answer})
    with suppress(FileNotFoundError):
        path.unlink()
