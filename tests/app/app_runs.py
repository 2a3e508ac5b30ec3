"""Runs with a stand-in trainer, in a folder of their own, all ended after each test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.runs import launch
from app.runs.status import read_status
from trainer.contract.run_dir import RunDir

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
"""For processes that a test starts itself: they find the source and the tests' own modules."""
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


def fake_command(mode: str) -> list[str]:
    """Return what stands in for `python -m trainer`."""
    return [sys.executable, str(FAKE_TRAINER), mode]


def wait_for(what: Callable[[], object], timeout_s: float = 120.0) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Runs:
    """Starts runs in a folder and remembers them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_text = ""
        self.started: list[RunDir] = []

    def prepared(self, name: str) -> tuple[RunDir, list[str]]:
        """Return a prepared run and its request as the last argument of a trainer's command."""
        run = RunDir(self.folder / name)
        self.started.append(run)
        preparation = launch.Preparation(
            config_text=self.config_text,
            overrides=(),
            resume="auto",
            argv=("menma", "train", "x.toml"),
        )
        return run, ["train", str(launch.prepare(run, preparation))]

    def start(self, mode: str, name: str = "run") -> RunDir:
        """Start a run as `menma train --detach` does."""
        run = RunDir(self.folder / name)
        lock = launch.claim(run)
        run, request = self.prepared(name)
        launch.start(run, lock, [*fake_command(mode), *request])
        return run

    def supervise(self, mode: str, *options: str, name: str = "run") -> subprocess.Popen[bytes]:
        """Run a supervisor as a child of the test."""
        run, request = self.prepared(name)
        command = [sys.executable, "-m", "app.runs.supervise", str(run.root), *options, "--"]
        return subprocess.Popen([*command, *fake_command(mode), *request], env=ENVIRONMENT)

    def end_all(self) -> None:
        """Kill what is left."""
        for run in self.started:
            status = read_status(run)
            for process in (status.trainer, status.supervisor) if status else ():
                if process is not None and process.is_alive():
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
