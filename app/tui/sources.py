"""Where the screens read from."""

from __future__ import annotations

import shlex
from pathlib import Path

from app.queue.store import QueueStore, queue_folder
from app.runs.failure import Failure, command_of, read_failure
from app.tui.overview import BAD, Entry, Overview, read_overview
from trainer.contract.errors import DiskError
from trainer.contract.run_dir import RunDir


class Sources:
    """The runs of a folder and the queue of this user.

    Args:
        runs_dir: folder of the runs.
        queue: folder of the queue; None: the user's.
        read_only: to look only: no queue is made, and `store` is None.
    """

    def __init__(
        self, runs_dir: Path, queue: Path | None = None, *, read_only: bool = False
    ) -> None:
        self.runs_dir = runs_dir
        self.read_only = read_only
        self.folder = queue or queue_folder()
        self._problem = ""
        self.store = None if read_only else self._open()

    def overview(self) -> Overview:
        """Read runs and jobs. Called from a thread: it has a connection of its own."""
        if self.read_only and not QueueStore.exists(self.folder):
            return read_overview(self.runs_dir, None)
        try:
            store = QueueStore(self.folder)
        except DiskError as error:
            return read_overview(self.runs_dir, None, error.message)
        try:
            return read_overview(self.runs_dir, store)
        except DiskError as error:
            return read_overview(self.runs_dir, None, error.message)
        finally:
            store.close()

    def command_of(self, entry: Entry) -> str:
        """Return the command line that started a run, as it can be typed again."""
        if entry.run is None:
            return ""
        return command_of(RunDir(entry.run.root)) or "it is not known"

    def failure_of(self, entry: Entry) -> Failure | None:
        """Return why a run or a job failed; None where it did not. Called from a thread."""
        if entry.state not in BAD:
            return None
        spec = entry.job.job.spec if entry.job is not None else None
        command = f"cd {shlex.quote(str(spec.cwd))}\nmenma {shlex.join(spec.argv)}" if spec else ""
        found = None
        if entry.run is not None:
            run = RunDir(entry.run.root)
            found = read_failure(run, entry.run, name=entry.name, command=command)
        return found or Failure(
            name=entry.name,
            what=f"{entry.name}: {entry.state}",
            why=(entry.why,) if entry.why else (),
            try_next=("`r` in the list queues the job again",) if entry.job is not None else (),
        )

    def _open(self) -> QueueStore | None:
        try:
            return QueueStore(self.folder)
        except DiskError as error:
            self._problem = error.message
            return None
