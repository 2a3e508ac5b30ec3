"""How long `menma --help` takes, against a bare interpreter. Prints one JSON object."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 11
LIMIT_S = 0.5
ROOT = Path(__file__).parents[2]


def seconds(*arguments: str) -> float:
    """Return the median wall time of the interpreter with these arguments."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        )
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    bare, helped = seconds("-c", "pass"), seconds("-m", "app", "--help")
    figures = {"python_s": bare, "help_s": helped, "ratio": helped / bare, "limit_s": LIMIT_S}
    print(json.dumps({"bench": "help", **figures}))
    sys.exit(helped > LIMIT_S)
