"""`python -m trainer JOB REQUEST.json`: run one job headless."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from trainer.jobs.base import main


def interrupt(number: int, frame: FrameType | None) -> None:
    """Let SIGTERM end a job the way Ctrl-C does: exit code 130, and a word in the run's log."""
    raise KeyboardInterrupt


def leave(code: int) -> None:
    """End this process; one of several without the interpreter's clean-up.

    gloo's threads can abort a process that has done its work while the interpreter takes itself
    down, and the run would count as failed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # too late: how the job ended is decided
        signal.signal(number, signal.SIG_IGN)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    leave(main(sys.argv[1:]))
