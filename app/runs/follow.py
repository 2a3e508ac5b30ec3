"""Read the events of a run: the last ones, or all of them as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.contract.events import EventReader

TAIL_BYTES = 256 * 1024
POLL_S = 0.5

Event = dict[str, Any]


def tail_events(path: Path, num_bytes: int = TAIL_BYTES) -> list[Event]:
    """Return the events of the last `num_bytes` of a log; damaged lines are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - num_bytes))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    # The first piece may be cut by our seek, the last one by a writer that has not finished.
    lines = lines[1 if size > num_bytes else 0 : -1]
    return [event for line in lines if (event := _decode(line)) is not None]


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


def _decode(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "type" in event else None
