"""What a run says about itself: events, TensorBoard, measured peaks. Rank 0 speaks."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.contract.errors import ConfigError
from trainer.contract.files import write_json
from trainer.core.types import StepResult

Sink = Callable[[Mapping[str, Any]], None]
GIB = 2**30
_WINDOW = 50
"""Steps whose durations are averaged for `step_time_s` and the time left."""


class EventLog:
    """Sends events to all sinks; on ranks other than 0 it has none."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = list(sinks)

    def add(self, sink: Sink) -> None:
        """Send further events to `sink`, too."""
        self._sinks.append(sink)

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Send one event."""
        for sink in self._sinks:
            sink({"type": kind, **fields})


class RunReporter:
    """Turns the loop's steps into events."""

    def __init__(self, emit: EventLog, device: torch.device, steps_per_epoch: float) -> None:
        self._emit = emit
        self._device = device
        self._steps_per_epoch = steps_per_epoch
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._last = 0.0
        self._total = 0

    def start(self, step: int, total_steps: int) -> None:
        """Say where the run begins."""
        self._total = total_steps
        self._last = time.monotonic()
        detail = f"from step {step}" if step else "from the start"
        self._emit("phase", name="train", detail=detail, step=step, total_steps=total_steps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (saving, sampling) out of the step times."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._last += time.monotonic() - started

    def step(self, step: int, result: StepResult) -> None:
        """Report one update of the weights."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        step_time = sum(self._durations) / len(self._durations)
        self._emit(
            "step",
            step=step,
            total_steps=self._total,
            epoch=round(step / self._steps_per_epoch, 4),
            loss=result.loss,
            terms=dict(result.terms),
            lr=result.lr,
            grad_norm=result.grad_norm,
            step_time_s=round(step_time, 4),
            eta_s=round(step_time * (self._total - step), 1),
            **memory_gib(self._device),
        )


def memory_gib(device: torch.device) -> dict[str, float]:
    """Return resident host memory and, on a GPU, the peak of reserved memory, in GiB."""
    memory = {"rss_gib": round(psutil.Process().memory_info().rss / GIB, 3)}
    if device.type == "cuda":
        memory["peak_vram_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 3)
    return memory


def peaks_gib(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process so far: host, and reserved on a GPU, in GiB."""
    peaks = memory_gib(device)
    peaks["peak_rss_gib"] = round(_peak_rss_bytes() / GIB, 3)
    del peaks["rss_gib"]
    return peaks


def write_peaks(path: Path, device: torch.device) -> None:
    """Write the peak memory of this process so far."""
    write_json(path, peaks_gib(device))


def _peak_rss_bytes() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class TensorBoardSink:
    """Writes the figures of step and validation events as TensorBoard scalars.

    A run that goes on from an earlier step takes back the figures of the steps it does again.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare; the log is opened with the first figure.

        Raises:
            ConfigError: the tensorboard package is not installed.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard needs the tensorboard package",
                hint="pip install tensorboard, or set logging.tensorboard = false",
            ) from error
        self._open = partial(SummaryWriter, log_dir=str(folder))
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write what of the event is a figure."""
        if event["type"] not in {"step", "validation"} or "step" not in event:
            return
        if self._writer is None:
            self._writer = self._open(purge_step=event["step"])
        prefix = "train" if event["type"] == "step" else "validation"
        figures = {key: event.get(key) for key in ("loss", "lr", "grad_norm", "step_time_s")}
        figures |= {f"terms/{name}": value for name, value in event.get("terms", {}).items()}
        by_timestep = event.get("by_timestep", {})
        figures |= {f"timestep_{name}": value for name, value in by_timestep.items()}
        figures |= {key: event.get(key) for key in ("rss_gib", "peak_vram_gib")}
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}/{name}", value, event["step"])
        self._writer.flush()
