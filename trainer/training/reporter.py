"""What a run says about itself: events and measured peaks. Rank 0 speaks."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.contract.files import write_json
from trainer.core.types import StepResult

Sink = Callable[[Mapping[str, Any]], None]
Details = Callable[[int], Mapping[str, Any]]
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

    def __init__(
        self,
        emit: EventLog,
        device: torch.device,
        steps_per_epoch: float,
        items_per_epoch: int | None = None,
        details: Sequence[Details] = (),
    ) -> None:
        """Prepare.

        Args:
            emit: where events go.
            device: whose memory is told.
            steps_per_epoch: steps of one epoch.
            items_per_epoch: its items, for the throughput; None: it is not told.
            details: give further fields of the events of some steps. Collective calls: all
                processes report each step.
        """
        self._emit = emit
        self._device = device
        self._steps_per_epoch = steps_per_epoch
        self._items_per_step = (items_per_epoch or 0) / steps_per_epoch
        self._details = tuple(details)
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
        more = {key: value for told in self._details for key, value in told(step).items()}
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
            **self._throughput(step_time),
            **more,
            **memory_gib(self._device),
        )

    def _throughput(self, step_time_s: float) -> dict[str, float]:
        if not self._items_per_step or step_time_s <= 0:
            return {}
        return {"items_per_s": round(self._items_per_step / step_time_s, 4)}


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
