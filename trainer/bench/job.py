"""The job `bench`: run benchmarks, one after another, and say which limits hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from trainer.bench.result import Measurement
from trainer.contract.errors import RunError
from trainer.contract.jobs import BenchRequest
from trainer.contract.registry import Entry, Registry
from trainer.jobs.base import Emit

_LARGE = frozenset({"load_fp8_14b", "loraid"})
"""Run when asked for by name only."""
BENCHMARKS: Registry[Any] = Registry(
    "benchmark",
    Entry("step", "trainer.bench.step", "training step against diffusers + PEFT"),
    Entry("sample", "trainer.bench.sample", "sampling a video against diffusers' pipeline"),
    Entry("engine", "trainer.bench.engine", "engine against a plain loop"),
    Entry("load", "trainer.bench.load", "peak RAM of loading a model (writes 2.7 GiB for a while)"),
    Entry("load_fp8", "trainer.bench.load_fp8", "peak RAM of loading fp8 (writes 1.4 GiB)"),
    Entry(
        "load_fp8_14b",
        "trainer.bench.load_fp8_14b",
        "the same of a 14B model (writes 13.5 GiB)",
    ),
    Entry("loraid", "trainer.bench.loraid", "what merged LoRAs keep: slots or not (minutes)"),
    Entry("sample_cache", "trainer.bench.sample_cache", "sampling with a step cache"),
    Entry("help", "trainer.bench.help", "time of menma --help"),
    Entry("estimate", "trainer.bench.estimate", "time of one estimate"),
)
"""Each target is a module with `measure() -> Measurement`."""


def run(request: BenchRequest, emit: Emit) -> None:
    """Job `bench`; one `output` event a benchmark, then a table in words.

    Raises:
        ConfigError: there is no benchmark of that name.
        RunError: a benchmark that was asked for by name could not run.
    """
    entries = [BENCHMARKS[name] for name in request.names or usual()]
    rows = []
    for entry in entries:
        emit("phase", name="bench", detail=f"{entry.name}: {entry.summary}")
        try:
            measurement = _measure(entry.target)
        except ImportError as error:
            reason = f"{entry.name} needs the test extra ({error.name} is not installed)"
            if request.names:
                raise RunError(reason, hint="run: bash install.sh --dev") from error
            emit("warning", message=reason, hint="bash install.sh --dev installs it")
            continue
        emit("output", **measurement.fields)
        rows.append(_row(measurement))
    for row in rows:
        emit("log", message=row)


def usual() -> list[str]:
    """Return the benchmarks that run where none is named."""
    return [name for name in BENCHMARKS.names if name not in _LARGE]


def _measure(module: str) -> Measurement:
    measure = importlib.import_module(module).measure
    return cast("Callable[[], Measurement]", measure)()


def _row(measurement: Measurement) -> str:
    unit = " s" if measurement.unit == "s" else ""
    verdict = "fine" if measurement.fine else "OVER THE LIMIT"
    value = f"{measurement.value:.3f}{unit}"
    if measurement.limit is None:
        return f"{measurement.what:<46} {value:>9}"
    limit = f"{measurement.limit:g}{unit}"
    return f"{measurement.what:<46} {value:>9}  limit {limit:<7} {verdict}"
