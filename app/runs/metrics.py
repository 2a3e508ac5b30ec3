"""What a run has told so far, in columns: for curves and figures, read step by step."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract.events import EventReader
from trainer.contract.run_dir import RunDir

NAN = math.nan
SERIES = ("loss", "lr", "grad_norm", "step_time_s")
MAX_MESSAGES = 200


@dataclass(slots=True)
class RunLog:
    """The events of a run as columns. `read` takes in what is new.

    A run that was resumed does some steps again: what was told of them before is forgotten.
    """

    run: RunDir
    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(
        default_factory=lambda: {name: array("d") for name in SERIES}
    )
    """Series name -> value of each step in `steps`; NaN where none was told."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    samples: list[tuple[int, Path]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    messages: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=MAX_MESSAGES))
    """Kind (`log`, `warning`, `error`, `phase`) and words."""
    last_step: Mapping[str, Any] = field(default_factory=dict)
    """The newest `step` event, with all that it tells."""
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
    def bad_lines(self) -> int:
        """Lines that could not be read as events."""
        return 0 if self._reader is None else self._reader.bad_lines

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
        for column in self.columns.values():
            del column[:]
        for told in (self.validation, self.samples, self.checkpoints, self.outputs):
            told.clear()
        self.messages.clear()
        self.last_step = {}

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, step = event.get("type"), event.get("step")
        if kind == "step" and isinstance(step, int):
            self._take_step(step, event)
        elif kind == "validation" and isinstance(step, int):
            self._take_validation(step, _number(event.get("loss")))
        elif kind == "sample" and isinstance(step, int) and isinstance(event.get("path"), str):
            self.samples.append((step, Path(event["path"])))
        elif kind == "checkpoint" and isinstance(step, int):
            self.checkpoints.append(step)
        elif kind == "output" and isinstance(event.get("path"), str):
            self.outputs.append(Path(event["path"]))
        elif kind in {"log", "warning", "error"}:
            self.messages.append((str(kind), str(event.get("message", ""))))
        elif kind == "phase":
            words = f"{event.get('name', '')} {event.get('detail', '')}".strip()
            self.messages.append(("phase", words))

    def _take_step(self, step: int, event: Mapping[str, Any]) -> None:
        if self.steps and step <= self.steps[-1]:
            keep = bisect_left(self.steps, step)
            del self.steps[keep:]
            for column in self.columns.values():
                del column[keep:]
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(_number(event.get(name)))
        self.last_step = event

    def _take_validation(self, step: int, loss: float) -> None:
        while self.validation and self.validation[-1][0] >= step:
            self.validation.pop()
        self.validation.append((step, loss))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else NAN
