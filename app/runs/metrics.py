"""What a run has told so far, in columns: for curves and figures, read step by step."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from app.runs.printable import printable
from app.runs.samples import Sample, sample_of
from trainer.contract.events import EventReader, decode
from trainer.contract.run_dir import RunDir

NAN = math.nan
MAX_MESSAGES = 200
MAX_SERIES = 128
"""Further names are left out: a log with so many is damaged."""
MAX_STEP = 2**53
NOT_SERIES = frozenset({"type", "v", "time", "step", "total_steps", "eta_s"})
"""Numbers of a `step` event that are no measurement of the step."""
VALIDATION = "validation/loss"
LONG_BYTES = 4 * 2**20
"""A log of this size takes long enough to be read that its shape is shown first."""
PART_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Series:
    """One scalar over the steps at which it was told."""

    steps: Sequence[int]
    values: Sequence[float]
    """As many; NaN where the step has none."""

    def place(self, step: int) -> int:
        """Return the place of the last step up to `step`; before the first one, 0."""
        return max(bisect_left(self.steps, step + 1) - 1, 0)

    def at(self, step: int) -> tuple[int, float] | None:
        """Return the last step up to `step` and its value; before the first one, the first."""
        if not self.steps:
            return None
        return self.steps[self.place(step)], self.values[self.place(step)]


@dataclass(slots=True)
class RunLog:
    """The events of a run as columns. `read` takes in what is new.

    A run that was resumed does some steps again: what was told of them before is forgotten.
    """

    run: RunDir
    steps: array[int] = field(default_factory=lambda: array("q"))
    validation: list[tuple[int, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    previews: dict[str, Sample] = field(default_factory=dict)
    """Subject -> rough picture of what is being made at the moment."""
    checkpoints: list[int] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    messages: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=MAX_MESSAGES))
    """Kind (`log`, `warning`, `error`, `phase`) and words."""
    num_messages: int = 0
    """All there were, also those that `messages` has no longer."""
    last_step: Mapping[str, Any] = field(default_factory=dict)
    """The newest `step` event, with all that it tells."""
    restarts: int = 0
    """How often steps were taken back, or the log was replaced."""
    _columns: dict[str, array[float]] = field(default_factory=dict)
    """Name -> values of the first steps; the rest of the steps have none so far."""
    _measured: dict[str, tuple[array[int], array[float]]] = field(default_factory=dict)
    """Name -> steps and values of what is not measured at every step."""
    _layout: tuple[str, ...] = ()
    """Keys of the newest step."""
    _appends: list[tuple[str, Callable[[float], None]]] = field(default_factory=list)
    """Its measurements, each with how its column takes one."""
    _groups: list[str] = field(default_factory=list)
    """Its keys with measurements below them."""
    _reader: EventReader | None = None

    def read(self, limit: int | None = None) -> int:
        """Take in new events, at most `limit`; return how many there were."""
        if self._reader is None or self._replaced(self._reader):
            self._forget()
            self._reader = EventReader(self.run.events)
        count = 0
        for event in self._reader.read():
            self._take(event)
            count += 1
            if limit is not None and count >= limit:
                break
        return count

    @property
    def names(self) -> tuple[str, ...]:
        """The series that there are, those of every step first."""
        return (*self._columns, *self._measured)

    def series(self, name: str) -> Series:
        """Return a series; an empty one where nothing was told of it."""
        if name in self._measured:
            return Series(*self._measured[name])
        column = self._columns.get(name)
        if column is None:
            return Series((), ())
        column.extend([NAN] * (len(self.steps) - len(column)))
        return Series(self.steps, column)

    @property
    def bad_lines(self) -> int:
        """Lines that could not be read as events."""
        return 0 if self._reader is None else self._reader.bad_lines

    @property
    def share_read(self) -> float:
        """How much of the log has been read, from 0 to 1."""
        try:
            size = self.run.events.stat().st_size
        except OSError:
            return 1.0
        return min(self._reader.offset / size, 1.0) if self._reader and size else 1.0

    def _replaced(self, reader: EventReader) -> bool:
        try:
            status = reader.path.stat()
        except OSError:
            return False
        return bool(reader.inode) and (
            status.st_ino != reader.inode or status.st_size < reader.offset
        )

    def _forget(self) -> None:
        del self.steps[:]
        self._columns.clear()
        self._measured.clear()
        self._layout = ()
        for told in (self.validation, self.samples, self.checkpoints, self.outputs):
            told.clear()
        self.previews.clear()
        self.messages.clear()
        self.last_step = {}
        self.restarts += 1

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, step = event["type"], event.get("step")
        if kind == "step":
            if _is_step(step):
                self._take_step(step, event)
        elif kind in {"log", "warning", "error"}:
            hint = f" ({event['hint']})" if event.get("hint") else ""
            self._say(kind, f"{event.get('message', '')}{hint}")
        elif kind == "phase":
            self._say("phase", f"{event.get('name', '')} {event.get('detail', '')}".strip())
        elif kind == "output" and isinstance(event.get("path"), str):
            self.outputs.append(Path(event["path"]))
        elif _is_step(step):
            self._take_result(kind, step, event)

    def _take_result(self, kind: str, step: int, event: Mapping[str, Any]) -> None:
        if kind == "validation":
            self._take_validation(step, event)
        elif kind == "sample" and (sample := sample_of(self.run, step, event)) is not None:
            self.samples.append(sample)
            self.previews.pop(sample.subject, None)
        elif kind == "preview" and (sample := sample_of(self.run, step, event)) is not None:
            self.previews[sample.subject] = sample
        elif kind == "checkpoint":
            self.checkpoints.append(step)

    def _say(self, kind: str, words: str) -> None:
        self.messages.append((kind, printable(words)))
        self.num_messages += 1

    def _take_step(self, step: int, event: Mapping[str, Any]) -> None:
        if self.steps and step <= self.steps[-1]:
            keep = bisect_left(self.steps, step)
            del self.steps[keep:]
            for column in self._columns.values():
                del column[keep:]
            self.restarts += 1
        self.steps.append(step)
        self.previews.clear()  # a sample that was not made is not made any more
        self.last_step = event
        if tuple(event) != self._layout:
            self._lay_out(event)
        for name, append in self._appends:
            value = event[name]
            append(value if type(value) is float else _number(value))
        for name in self._groups:
            if isinstance(event[name], dict):
                self._put_group(name, event[name])

    def _lay_out(self, event: Mapping[str, Any]) -> None:
        """Find the columns of a step that tells something else than the one before.

        Nearly all steps tell the same, and 100,000 of them are read at once.
        """
        self._layout, self._appends, self._groups = tuple(event), [], []
        for name, value in event.items():
            if isinstance(value, dict):
                self._groups.append(name)
            elif name in NOT_SERIES:
                continue
            elif not _is_measurement(value):
                self._layout = ()  # damage, or a word: the next step is looked at anew
            elif (column := self._column(name)) is not None:
                self._appends.append((name, column.append))

    def _put_group(self, group: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if _is_measurement(value):
                column = self._column(f"{group}/{name}")
                if column is not None:
                    column.append(_number(value))

    def _column(self, name: str) -> array[float] | None:
        """Return a column that waits for the newest step's value; None: there are too many."""
        column = self._columns.get(name)
        if column is None:
            if len(self._columns) >= MAX_SERIES:
                return None
            column = self._columns[name] = array("d")
        missing = len(self.steps) - 1 - len(column)
        if missing > 0:
            column.extend([NAN] * missing)
        return column

    def _take_validation(self, step: int, event: Mapping[str, Any]) -> None:
        loss = _number(event.get("loss"))
        while self.validation and self.validation[-1][0] >= step:
            self.validation.pop()
        self.validation.append((step, loss))
        parts = event.get("by_timestep")
        figures = {VALIDATION: loss}
        if isinstance(parts, dict):
            figures |= {f"validation/timestep_{t}": _number(part) for t, part in parts.items()}
        for name, value in figures.items():
            if name not in self._measured and len(self._measured) >= MAX_SERIES:
                continue
            steps, values = self._measured.setdefault(name, (array("q"), array("d")))
            keep = bisect_left(steps, step)
            del steps[keep:], values[keep:]
            steps.append(step)
            values.append(value)


def _is_step(step: Any) -> TypeGuard[int]:
    return isinstance(step, int) and 0 <= step < MAX_STEP


def _is_measurement(value: Any) -> bool:
    """Tell a number from a word; one that was not finite is null in the log."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else NAN
    except OverflowError:  # a whole number of hundreds of digits
        return NAN


def overview(run: RunDir, num_parts: int = 256) -> tuple[list[int], list[float]]:
    """Return steps and losses from all over a long log, in a moment; of a short one nothing.

    They have the shape of the curve and not every spike: for as long as the log is being read.
    """
    found: dict[int, float] = {}
    try:
        with run.events.open("rb") as file:
            size = file.seek(0, 2)
            if size < LONG_BYTES:
                return [], []
            for part in range(num_parts):
                file.seek(part * (size - PART_BYTES) // (num_parts - 1))
                # The first and the last piece may be parts of lines.
                for line in file.read(PART_BYTES).split(b"\n")[1:-1]:
                    event = decode(line) or {}
                    if event.get("type") == "step" and _is_step(event.get("step")):
                        found[event["step"]] = _number(event.get("loss"))
    except OSError:
        return [], []
    steps = sorted(found)
    return steps, [found[step] for step in steps]
