"""`menma` with the stand-in trainer: cli_driver.py MODE ARGUMENT…"""

from __future__ import annotations

import sys

from app_runs import fake_command

from app.cli.main import run
from app.runs import child

if __name__ == "__main__":
    child.TRAINER = tuple(fake_command(sys.argv[1]))
    sys.argv = ["menma", *sys.argv[2:]]
    sys.exit(run(sys.argv[1:]))
