"""Read the events of a run: the last ones, or all of them as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.contract.events import EventReader, decode

TAIL_BYTES = 256 * 1024
SHORT_TAIL_BYTES = 16 * 1024
"""What is read first: the last words of most logs. More is read where it has no step."""
POLL_S = 0.5

Event = dict[str, Any]


def tail_events(path: Path, num_bytes: int = TAIL_BYTES, *, start: int = 0) -> list[Event]:
    """Return the last events of a log; damaged lines are left out.

    Args:
        path: the event log.
        num_bytes: the most that is read.
        start: events that begin before this byte are left out.
    """
    try:
        status = path.stat()
    except OSError:
        return []
    key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
    short = min(num_bytes, SHORT_TAIL_BYTES)
    found = _tail(*key, short)
    if short < min(num_bytes, status.st_size) and not any(e["type"] == "step" for _, e in found):
        found = _tail(*key, num_bytes)
    return [event for offset, event in found if offset >= start]


@lru_cache(maxsize=128)
def _tail(
    path: Path, inode: int, size: int, changed: int, num_bytes: int
) -> tuple[tuple[int, Event], ...]:
    """Return events with where they begin; a log that has not changed is read once."""
    begin = max(0, size - num_bytes)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            lines = file.read(num_bytes).split(b"\n")
    except OSError:
        return ()
    # The first piece may be cut by our seek, the last one by a writer that has not finished.
    skipped = 1 if begin else 0
    begin += sum(len(line) + 1 for line in lines[:skipped])
    found = []
    for line in lines[skipped:-1]:
        event = decode(line) if line.strip() else None
        if event is not None and _has_time(event):
            found.append((begin, event))
        begin += len(line) + 1
    return tuple(found)


def _has_time(event: Event) -> bool:
    moment = event.get("time", 0.0)
    return isinstance(moment, int | float) and math.isfinite(moment)


def follow(
    path: Path,
    is_over: Callable[[], bool],
    *,
    offset: int = 0,
    poll_s: float = POLL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Event | None]:
    """Yield events as they are written, and None after each look that found no more.

    Args:
        path: the event log; it may not exist yet.
        is_over: asked after each look; once true, what is left is read and the iteration ends.
        offset: where in the file to begin.
        poll_s: pause between looks.
        sleep: for tests.
    """
    reader = EventReader(path)
    if offset and path.exists():
        reader.offset, reader.inode = offset, path.stat().st_ino
    while True:
        over = is_over()
        yield from reader.read()
        if over:
            return
        yield None
        sleep(poll_s)
