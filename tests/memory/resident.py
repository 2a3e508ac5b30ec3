"""How much resident memory a piece of code takes at most, read from Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # of malloc.h


class Growth:
    """What the process took at most, beyond what it had before."""

    num_bytes = 0


def can_measure() -> bool:
    """Whether the peak can be set back here."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text(encoding="ascii")


@contextmanager
def growth() -> Iterator[Growth]:
    """Measure what is taken inside; free memory that the process only keeps is given back first.

    Meanwhile pieces of more than 128 KiB are mapped on their own, as glibc always does with pieces
    of more than 32 MiB, which those of real models are: what is freed is free.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, 128 * 1024)
    found = Growth()
    _CLEAR.write_text("5", encoding="ascii")
    before = _bytes("VmRSS")
    try:
        yield found
    finally:
        found.num_bytes = _bytes("VmHWM") - before
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)


def _bytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
