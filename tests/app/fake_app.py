"""Stands in for `python -m app` in the queue: fake_app.py COMMAND NAME MODE [--detach].

`train` starts a supervised run of the fake trainer in runs/NAME, as `menma train --detach` does.
Everything else writes a line into ran.txt, and then: MODE `quick` ends, `fail` ends with code 1,
`long` goes on until it is told to end.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(command: str, name: str, mode: str) -> int:
    """Do what the command would."""
    if command == "train":
        from app_runs import Runs

        Runs(Path("runs")).start(mode, name)
        return 0
    line = f"{name} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')} {Path.cwd()}\n"
    descriptor = os.open("ran.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    print(f"words of {name}", flush=True)
    if mode == "long":
        time.sleep(600)
    return 1 if mode == "fail" else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
