"""Where the screens read from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from app.queue.store import QueueStore, queue_folder
from app.tui.overview import Entry, Overview, read_overview
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
        self._folder = queue or queue_folder()
        self._problem = ""
        self.store = None if read_only else self._open()

    def overview(self) -> Overview:
        """Read runs and jobs. Called from a thread: it has a connection of its own."""
        if self.read_only and not QueueStore.exists(self._folder):
            return read_overview(self.runs_dir, None)
        try:
            store = QueueStore(self._folder)
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
        try:
            content = json.loads(RunDir(entry.run.root).command.read_text(encoding="utf-8"))
            return f"cd {shlex.quote(content['cwd'])}\n{shlex.join(content['argv'])}"
        except (OSError, ValueError, KeyError, TypeError):
            return "it is not known"

    def _open(self) -> QueueStore | None:
        try:
            return QueueStore(self._folder)
        except DiskError as error:
            self._problem = error.message
            return None
