"""Which process is which: start times and boot ids tell ours from one that got its pid later."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOOT_CLOCK_TOLERANCE_S = 120
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid and when that process started; together they name one process for one boot."""

    pid: int
    start_time: float
    """Clock ticks since boot on Linux, Unix seconds elsewhere; only compared for equality."""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Identify a living process.

        Raises:
            ProcessLookupError: it is gone.
        """
        started = start_time(pid)
        if started is None:
            raise ProcessLookupError(pid)
        return cls(pid, started)

    @classmethod
    def from_json(cls, content: Any) -> ProcessId | None:
        """Read what `to_json` wrote; None for anything else."""
        try:
            return cls(int(content["pid"]), float(content["start_time"]))
        except (TypeError, KeyError, ValueError):
            return None

    def to_json(self) -> dict[str, float]:
        """Return plain values for a JSON file."""
        return {"pid": self.pid, "start_time": self.start_time}

    def age(self) -> float | None:
        """Return for how many seconds it lives, which does not depend on how the clock is set.

        None where the system does not say (not Linux, or it is gone).
        """
        if not self.is_alive() or not hasattr(time, "CLOCK_BOOTTIME"):
            return None
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.start_time / os.sysconf("SC_CLK_TCK")

    def is_alive(self) -> bool:
        """Tell whether this very process still runs (a zombie does not)."""
        return start_time(self.pid) == self.start_time


def start_time(pid: int) -> float | None:
    """Return when the process started, or None when there is none (or only its zombie)."""
    if (_PROC / "self" / "stat").exists():
        # Ticks since boot do not move when the wall clock is set; psutil's create_time does.
        try:
            stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None


def boot_id() -> str:
    """Return a name of this boot of this machine."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return f"time:{round(psutil.boot_time())}"


def same_boot(one: str, other: str) -> bool:
    """Tell whether two boot ids mean the same boot; boot times may drift with the clock."""
    if one.startswith("time:") and other.startswith("time:"):
        with suppress(ValueError):
            return abs(int(one[5:]) - int(other[5:])) <= BOOT_CLOCK_TOLERANCE_S
    return one == other


def host_name() -> str:
    """Return this machine's name, for messages."""
    return socket.gethostname()


def end_tree(process: ProcessId, *, kill: bool) -> bool:
    """Tell the process group (Windows: the process tree) to end now, or kill it.

    To end now takes two signals: a trainer answers the first by saving before it leaves.

    Returns:
        Whether there was something to signal.
    """
    if not process.is_alive():
        return False
    if os.name == "nt":
        return _end_tree_portably(process, kill=kill)
    try:
        for number in (signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _end_tree_portably(process: ProcessId, *, kill: bool) -> bool:
    import psutil

    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.Error:
        return False
    for member in family:
        with suppress(psutil.Error):
            member.kill() if kill else member.terminate()
    return True
