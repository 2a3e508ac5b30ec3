"""The event log of a run: append-only JSON lines, versioned. Standard library only.

One object a line, each with `v` (format version), `time` (Unix seconds) and `type`:

    phase       name, detail; of one with a count done, total and eta_s
    step        step, total_steps, epoch, loss, terms {name: part of the loss…}, lr, grad_norm,
                step_time_s, eta_s, items_per_s, rss_gib, peak_vram_gib (on a GPU);
                at some steps by_timestep {"0-100": loss…}, by_source {name of a source: loss…} and
                weight_norm {total, mean, largest}: `[logging]`
    sample      step, path, prompt, seed
    preview     path of a small picture of the sample in work, which the next one replaces;
                index of the sample, done and total (of the solver's steps), step
    checkpoint  step, path
    output      step, path, final (of a run); strips [{title, frames [path of a picture…]}…]
    validation  step, loss, by_timestep {"100": loss…}, items, seconds
    log | warning | error   message (and hint)
    end         reason ("done", "stopped", "failed"), step
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.files import disk_errors, utf8

VERSION = 1
_DECODER = json.JSONDecoder()
MAX_LINE_BYTES = 64 * 1024
"""The longest line that is written."""
MAX_READ_BYTES = 16 * MAX_LINE_BYTES
"""A longer line is damage; it is passed over without being held in memory."""
EVENT_TYPES = (
    "phase",
    "step",
    "sample",
    "preview",
    "checkpoint",
    "output",
    "validation",
    "log",
    "warning",
    "error",
    "end",
)


def encode(kind: str, /, **fields: Any) -> str:
    """Return one event line, newline included.

    Raises:
        ValueError: an unknown type, or a line of more than 64 KiB.
    """
    if kind not in EVENT_TYPES:
        raise ValueError(f"unknown event type {kind!r}")
    event = {"v": VERSION, "time": round(time.time(), 3), "type": kind, **fields}
    text = json.dumps(_finite(event), ensure_ascii=False, allow_nan=False, default=str)
    line = utf8(text + "\n")
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"event {kind!r} is larger than {MAX_LINE_BYTES} bytes")
    return line.decode()


class EventWriter:
    """Appends events, one `write` each: a reader sees whole lines or an unfinished last one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Append one event.

        Raises:
            DiskError: the disk is full or gone.
        """
        content = encode(kind, **fields).encode()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if not _ends_with_newline(file):  # a killed writer left half a line
                    content = b"\n" + content
                file.write(content)


@dataclass(slots=True)
class EventReader:
    """Reads new events since the last call; survives truncation and half-written last lines."""

    path: Path
    offset: int = 0
    inode: int = 0
    bad_lines: int = 0
    _in_long_line: bool = False
    """Whether `offset` is inside a line that is too long."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the events that were added, skipping (and counting) lines that are damaged."""
        try:
            file = self.path.open("rb")
        except OSError:  # not there yet, deleted, or not ours to read
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.offset:
                self.inode, self.offset, self._in_long_line = status.st_ino, 0, False
            file.seek(self.offset)
            while line := file.readline(MAX_READ_BYTES):
                whole = line.endswith(b"\n")
                if not whole and len(line) < MAX_READ_BYTES:
                    return
                self.offset += len(line)
                if self._in_long_line or not whole:
                    self._in_long_line = not whole
                    self.bad_lines += whole
                    continue
                event = self._decode(line)
                if event is not None:
                    yield event

    def _decode(self, line: bytes) -> dict[str, Any] | None:
        if not line.strip():
            return None
        event = decode(line)
        self.bad_lines += event is None
        return event


def decode(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line; None for anything that is not one."""
    try:
        text = line.decode().strip()
        # A quarter faster than `json.loads`, which counts where there are 100,000 lines.
        event, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):  # RecursionError: a line of very many brackets
        return None
    whole = end == len(text) and isinstance(event, dict) and isinstance(event.get("type"), str)
    return event if whole else None


def _ends_with_newline(file: Any) -> bool:
    file.seek(0, os.SEEK_END)
    if file.tell() == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _finite(value: Any) -> Any:
    # JSON has no NaN; a reader in another language would choke on Python's spelling of it.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
