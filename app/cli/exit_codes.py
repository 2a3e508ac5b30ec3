"""Exit codes of every command."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a script can rely on."""

    DONE = 0
    FAILED = 1
    """The machine or the job failed, though the input was right."""
    MISTAKE = 2
    """The user's input is wrong; the message says what to change."""
    BUSY = 3
    """Another process holds the run."""
    INTERRUPTED = 130
    """Stopped on request (Ctrl-C, `menma runs stop`)."""


def of_child(code: int) -> int:
    """Return our exit code for a child's: its own, or `FAILED` when a signal ended it."""
    return code if code >= 0 else ExitCode.FAILED
