"""A trainer job that stays: lines of JSON go to its stdin, events come back on its stdout."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from app.runs.child import PATIENCE_S, Event, child_environment, parse_event, trainer_command
from trainer.contract.files import write_json

READY = "ready"
"""Name of the `phase` event with which the job says that it waits for the next line."""


class Conversation:
    """Runs a job that answers each line with events, the last of which says that it is ready.

    The job has a process group of its own: Ctrl-C is ours, and it is told with a line what to stop.
    """

    def __init__(self, job: str, request: Mapping[str, Any], on_words: Callable[[str], None]):
        """Prepare.

        Args:
            job: name of the trainer's job.
            request: its request, written to a temporary JSON file.
            on_words: called, from another thread, with every line on the job's stderr.
        """
        self.exit_code = 0
        self._job = job
        self._request = dict(request)
        self._on_words = on_words
        self._folder = tempfile.TemporaryDirectory(prefix="menma-")
        self._process: subprocess.Popen[str] | None = None
        self._words: threading.Thread | None = None

    def __enter__(self) -> Self:
        path = Path(self._folder.name) / "request.json"
        write_json(path, self._request)
        own_group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            own_group = {"creationflags": 0x200}  # CREATE_NEW_PROCESS_GROUP
        self._process = subprocess.Popen(
            trainer_command(self._job, path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(),
            encoding="utf-8",
            errors="replace",
            **own_group,
        )
        self._words = threading.Thread(target=self._pass_words, name="child stderr", daemon=True)
        self._words.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        self._folder.cleanup()

    @property
    def is_alive(self) -> bool:
        """Tell whether the job still takes lines."""
        return self._running.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Give the job a line; one that has ended is past caring."""
        stdin = self._running.stdin
        assert stdin is not None
        with suppress(BrokenPipeError, ValueError):
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()

    def wait_for_answer(self, on_event: Callable[[Event], None]) -> None:
        """Pass events on until the job is ready for the next line, or has ended.

        Ctrl-C raises; the call can be made again.
        """
        stdout = self._running.stdout
        assert stdout is not None
        while line := stdout.readline():
            event = parse_event(line)
            if event is None:
                self._on_words(line.rstrip("\n"))
            elif event["type"] == "phase" and event.get("name") == READY:
                return
            else:
                on_event(event)
        self._running.wait()

    def close(self, on_event: Callable[[Event], None]) -> None:
        """Say that there are no more lines, and wait for the job's end."""
        stdin = self._running.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):
            stdin.close()
        while self.is_alive:
            self.wait_for_answer(on_event)
        self.end()

    def end(self) -> None:
        """End the job if it still runs, in good order or not."""
        process = self._running
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE_S)
            process.kill()
        self.exit_code = process.wait()
        if self._words is not None:
            self._words.join(timeout=2)
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    @property
    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def _pass_words(self) -> None:
        assert self._running.stderr is not None
        for line in self._running.stderr:
            self._on_words(line.rstrip("\n"))
