"""How long `menma --help` takes, as one waits for it, beside a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from trainer.bench.result import Measurement

LIMIT_S = 0.5


def measure(*, rounds: int = 11) -> Measurement:
    """Return the median wall time of `menma --help`."""
    bare = _seconds("-c", "pass", rounds=rounds)
    value = _seconds("-m", "app", "--help", rounds=rounds)
    return Measurement(
        name="help",
        what="menma --help",
        value=value,
        unit="s",
        limit=LIMIT_S,
        figures={"python_s": round(bare, 4), "ratio": round(value / bare, 2)},
    )


def _seconds(*arguments: str, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
