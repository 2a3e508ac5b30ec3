"""The database of jobs: SQLite, one file in the user's state directory.

Several processes use it at once. A change is one transaction; what a job does is not in it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.domain.user_folders import state_folder
from app.queue.jobs import Claim, Job, JobSpec, JobState, Outcome
from trainer.contract.errors import DiskError, UserError

FORMAT = 1
FILE = "queue.db"
_PATIENCE_S = 30.0
_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  argv TEXT NOT NULL, name TEXT NOT NULL, cwd TEXT NOT NULL, environment TEXT NOT NULL,
  priority INTEGER NOT NULL, gpus TEXT NOT NULL, after TEXT NOT NULL, held INTEGER NOT NULL,
  position REAL NOT NULL, created REAL NOT NULL, cancelled REAL,
  token TEXT, folder TEXT, claimed REAL, devices TEXT,
  outcome TEXT, why TEXT, ended REAL
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (priority DESC, position) WHERE token IS NULL;
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_ORDER = "ORDER BY priority DESC, position, id"
_WAITS = "token IS NULL AND cancelled IS NULL"
_READY = f"""
SELECT * FROM jobs WHERE {_WAITS} AND held = 0 AND NOT EXISTS (
  SELECT 1 FROM json_each(jobs.after) AS needed LEFT JOIN jobs AS earlier
  ON earlier.id = needed.value WHERE earlier.outcome IS NOT 'done'
) {_ORDER} LIMIT ?
"""


def queue_folder() -> Path:
    """Return where the queue is kept: `$XDG_STATE_HOME/menma/queue`, ~/.local/state without it."""
    return state_folder() / "queue"


class QueueStore:
    """The jobs of this user on this machine.

    Args:
        folder: where the database is, and the folders of the jobs; made if it is not there.

    Raises:
        DiskError: the database cannot be opened or made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / FILE
        with self._errors():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(
                self._path, timeout=_PATIENCE_S, isolation_level=None
            )
            self._connection.row_factory = sqlite3.Row
            # Needs shared memory, which network volumes lack; SQLite then keeps the mode it has.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._make_tables()

    @staticmethod
    def exists(folder: Path) -> bool:
        """Tell whether there is a queue in a folder."""
        return (folder / FILE).exists()

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def add(self, spec: JobSpec) -> int:
        """Queue a job behind those of its priority; return its number.

        Raises:
            UserError: it waits for a job that does not exist.
        """
        return self.add_all([spec])[0]

    def add_all(self, specs: Sequence[JobSpec], *, chained: bool = False) -> list[int]:
        """Queue several jobs in one transaction.

        Args:
            specs: in the order in which they are to run.
            chained: each waits for the one before it, too.

        Raises:
            UserError: one waits for a job that does not exist.
        """
        numbers: list[int] = []
        with self._transaction():
            last = self._one("SELECT COALESCE(MAX(position), 0) FROM jobs")[0]
            for index, spec in enumerate(specs):
                after = (*spec.after, *numbers[-1:]) if chained else spec.after
                self._require(after)
                cursor = self._connection.execute(
                    "INSERT INTO jobs (argv, name, cwd, environment, priority, gpus, after, held,"
                    " position, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        json.dumps(spec.argv),
                        spec.name,
                        str(spec.cwd),
                        json.dumps(spec.environment),
                        spec.priority,
                        json.dumps(spec.gpus),
                        json.dumps(after),
                        spec.held,
                        last + 1 + index,
                        time.time(),
                    ),
                )
                numbers.append(int(cursor.lastrowid or 0))
        return numbers

    def jobs(self) -> list[Job]:
        """Return all jobs: those that wait in the order in which they will start."""
        with self._errors():
            return [_job(row) for row in self._connection.execute(f"SELECT * FROM jobs {_ORDER}")]

    def job(self, number: int) -> Job:
        """Return one job.

        Raises:
            UserError: there is none of this number.
        """
        with self._errors():
            row = self._connection.execute("SELECT * FROM jobs WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise UserError(f"no such job: {number}", hint="`menma queue list` shows the jobs")
        return _job(row)

    def ready(self, limit: int = 50) -> list[Job]:
        """Return the next jobs that wait for nothing but a free place."""
        with self._errors():
            return [_job(row) for row in self._connection.execute(_READY, (limit,))]

    def claimed(self) -> list[Job]:
        """Return the jobs that were handed to a worker and have not been seen to end."""
        query = "SELECT * FROM jobs WHERE token IS NOT NULL AND outcome IS NULL"
        with self._errors():
            return [_job(row) for row in self._connection.execute(query)]

    def claim(self, number: int, claim: Claim) -> bool:
        """Take a job to start it; False when somebody else has it, or it is not to start now."""
        return self._change(
            f"UPDATE jobs SET token = ?, folder = ?, claimed = ?, devices = ? "
            f"WHERE id = ? AND held = 0 AND {_WAITS} RETURNING id",
            (claim.token, str(claim.folder), claim.time, json.dumps(claim.devices), number),
        )

    def release(self, number: int, token: str) -> bool:
        """Give a job back that was claimed and never started."""
        return self._change(
            "UPDATE jobs SET token = NULL, folder = NULL, claimed = NULL, devices = NULL "
            "WHERE id = ? AND token = ? AND outcome IS NULL RETURNING id",
            (number, token),
        )

    def record(self, number: int, token: str, outcome: Outcome) -> bool:
        """Write down how a job ended; the first word counts."""
        return self._change(
            "UPDATE jobs SET outcome = ?, why = ?, ended = ? "
            "WHERE id = ? AND token = ? AND outcome IS NULL RETURNING id",
            (outcome.state.value, outcome.why, outcome.time, number, token),
        )

    def cancel(self, number: int) -> None:
        """Mark a job as cancelled; one that waits will not start."""
        self._change(
            "UPDATE jobs SET cancelled = ? WHERE id = ? AND outcome IS NULL RETURNING id",
            (time.time(), number),
        )

    def hold(self, number: int, *, held: bool) -> None:
        """Keep a job that waits from starting, or let it."""
        self._change("UPDATE jobs SET held = ? WHERE id = ? RETURNING id", (held, number))

    def set_priority(self, number: int, priority: int) -> None:
        """Let a job go before all those of a smaller priority."""
        self._change("UPDATE jobs SET priority = ? WHERE id = ? RETURNING id", (priority, number))

    def move(self, number: int, *, before: int | None) -> None:
        """Put a job right before another one (with its priority), or behind all of its own.

        Raises:
            UserError: there is no such job.
        """
        with self._transaction():
            job = self.job(number)
            if before is None:
                place = self._one("SELECT MAX(position) FROM jobs")[0] + 1
                priority = job.spec.priority
            else:
                other = self.job(before)
                priority = other.spec.priority
                previous = self._one(
                    "SELECT MAX(position) FROM jobs WHERE priority = ? AND position < ? "
                    "AND id != ?",
                    (priority, other.position, number),
                )[0]
                low = other.position - 1 if previous is None else previous
                place = (low + other.position) / 2
            self._connection.execute(
                "UPDATE jobs SET position = ?, priority = ? WHERE id = ?", (place, priority, number)
            )

    def replace(self, old: int, new: int) -> None:
        """Let what waits for job `old` wait for job `new`."""
        with self._transaction():
            for job in self.jobs():
                if job.waits and old in job.spec.after:
                    after = [new if number == old else number for number in job.spec.after]
                    self._connection.execute(
                        "UPDATE jobs SET after = ? WHERE id = ?", (json.dumps(after), job.id)
                    )

    def remove(self, numbers: Sequence[int]) -> None:
        """Forget jobs; their folders stay."""
        with self._transaction():
            for number in numbers:
                self._connection.execute("DELETE FROM jobs WHERE id = ?", (number,))

    @property
    def paused(self) -> bool:
        """Whether nothing is started for now."""
        with self._errors():
            row = self._connection.execute(
                "SELECT value FROM settings WHERE name = 'paused'"
            ).fetchone()
        return row is not None and row[0] == "yes"

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._change(
            "INSERT INTO settings VALUES ('paused', ?) "
            "ON CONFLICT (name) DO UPDATE SET value = excluded.value RETURNING value",
            ("yes" if paused else "no",),
        )

    def _make_tables(self) -> None:
        found = self._one("PRAGMA user_version")[0]
        if found > FORMAT:
            raise DiskError(
                f"{self._path} was written by a newer Menma", hint="update this installation"
            )
        if found < FORMAT:
            self._connection.executescript(f"{_TABLES} PRAGMA user_version = {FORMAT};")

    def _require(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.job(number)

    def _one(self, query: str, values: Sequence[Any] = ()) -> Any:
        return self._connection.execute(query, values).fetchone()

    def _change(self, query: str, values: Sequence[Any]) -> bool:
        with self._transaction():
            return self._one(query, values) is not None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DiskError(
                f"the queue in {self._path} cannot be used: {error}",
                hint="it needs a local disk that can be written; XDG_STATE_HOME moves it",
            ) from error


def _job(row: sqlite3.Row) -> Job:
    gpus = json.loads(row["gpus"])
    spec = JobSpec(
        argv=tuple(json.loads(row["argv"])),
        name=row["name"],
        cwd=Path(row["cwd"]),
        environment=json.loads(row["environment"]),
        priority=row["priority"],
        gpus=gpus if isinstance(gpus, int) else tuple(gpus),
        after=tuple(json.loads(row["after"])),
        held=bool(row["held"]),
    )
    claim = outcome = None
    if row["token"] is not None:
        devices = tuple(json.loads(row["devices"]))
        claim = Claim(row["token"], Path(row["folder"]), row["claimed"], devices)
    if row["outcome"] is not None:
        outcome = Outcome(JobState(row["outcome"]), row["why"], row["ended"])
    return Job(
        id=row["id"],
        spec=spec,
        position=row["position"],
        created=row["created"],
        cancelled=row["cancelled"],
        claim=claim,
        outcome=outcome,
    )
