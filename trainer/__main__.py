"""`python -m trainer JOB REQUEST.json`: run one job headless."""

from __future__ import annotations

import os
import sys

from trainer.jobs.base import main


def leave(code: int) -> None:
    """End this process; one of several without the interpreter's clean-up.

    gloo's threads can abort a process that has done its work while the interpreter takes itself
    down, and the run would count as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
