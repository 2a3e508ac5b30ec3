"""Start one trainer job as a child process: events come on its stdout, words on its stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.contract.files import write_json

SOURCE_ROOT = Path(__file__).parents[2]
TRAINER: tuple[str, ...] = (sys.executable, "-m", "trainer")
CANCEL_POLL_S = 0.1
PATIENCE_S = 10.0
"""How long a child may take to end when it is told to."""

Event = dict[str, Any]


def trainer_command(job: str, request: Path) -> list[str]:
    """Return the argv of a job."""
    return [*TRAINER, job, str(request)]


def child_environment() -> dict[str, str]:
    """Return this process's environment, with our own source first on the child's path.

    The current folder is kept off that path: a folder named `trainer` where the user happens to be
    must not be taken for ours.
    """
    paths = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    ours = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | ours


def run_job(
    job: str,
    request: Mapping[str, Any],
    on_event: Callable[[Event], None],
    on_text: Callable[[str], None],
    on_words: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> int:
    """Run a job to its end in the foreground. Any thread may do so; Ctrl-C is the main one's.

    Args:
        job: name of the trainer's job.
        request: its request, written to a temporary JSON file.
        on_event: called with every event.
        on_text: called with every line on the child's stdout that is not an event.
        on_words: called, from another thread, with every line on the child's stderr; None lets the
            child write to our stderr itself.
        cancelled: asked several times a second, from another thread; the job is ended when it
            says so.

    Returns:
        The job's exit code; 130 after Ctrl-C; negative: the signal that ended it.

    Ctrl-C reaches the child by the terminal. The first waits for it, the second ends it, the third
    kills it.
    """
    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        path = Path(folder) / "request.json"
        write_json(path, dict(request))
        process = subprocess.Popen(
            trainer_command(job, path),
            stdout=subprocess.PIPE,
            stderr=None if on_words is None else subprocess.PIPE,
            env=child_environment(),
            encoding="utf-8",
            errors="replace",
        )
        with (
            _terminated_with_us(process),
            _words_passed_on(process, on_words),
            _ended_when(process, cancelled),
        ):
            interrupts = 0
            while True:
                try:
                    _pass_on(process, on_event, on_text)
                    code = process.wait()
                except KeyboardInterrupt:
                    interrupts += 1
                    if interrupts == 2:
                        process.terminate()
                    elif interrupts > 2:
                        process.kill()
                else:
                    return 130 if interrupts else code


def _pass_on(
    process: subprocess.Popen[str],
    on_event: Callable[[Event], None],
    on_text: Callable[[str], None],
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        event = parse_event(line)
        if event is not None:
            on_event(event)
        elif line.strip():
            on_text(line.rstrip("\n"))


@contextmanager
def _words_passed_on(
    process: subprocess.Popen[str], on_words: Callable[[str], None] | None
) -> Iterator[None]:
    if process.stderr is None or on_words is None:
        yield
        return
    stream, show = process.stderr, on_words

    def read() -> None:
        for line in stream:
            show(line.rstrip("\n"))

    reader = threading.Thread(target=read, name="child stderr", daemon=True)
    reader.start()
    try:
        yield
    finally:
        # A grandchild may hold the pipe open longer than the job lives.
        reader.join(timeout=2)


@contextmanager
def _ended_when(
    process: subprocess.Popen[str], cancelled: Callable[[], bool] | None
) -> Iterator[None]:
    if cancelled is None:
        yield
        return
    over, asked = threading.Event(), cancelled

    def watch() -> None:
        while not over.wait(CANCEL_POLL_S):
            if asked():
                process.terminate()
                if not over.wait(PATIENCE_S):
                    process.kill()
                return

    watcher = threading.Thread(target=watch, name="child watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def parse_event(line: str) -> Event | None:
    """Return the event that a line of a job's stdout is; None: it is something else."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "type" in content else None


@contextmanager
def _terminated_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    """Pass a SIGTERM on to the child, and leave no child behind when we leave by an exception."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.terminate()

    ours = threading.current_thread() is threading.main_thread()  # signals are of that one alone
    previous = signal.signal(signal.SIGTERM, pass_on) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE_S)
            process.kill()
            process.wait()
