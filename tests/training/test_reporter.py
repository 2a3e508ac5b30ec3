from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.core.types import StepResult
from trainer.training import reporter as module
from trainer.training.reporter import EventLog, RunReporter, write_peaks


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def result(loss: float = 1.0) -> StepResult:
    return StepResult(terms={"loss": loss, "extra": 0.25}, grad_norm=2.0, lr=1e-4)


def test_steps_are_reported_with_their_time_and_what_is_left(clock: Clock) -> None:
    events: list[Any] = []
    reporter = RunReporter(EventLog(events.append), torch.device("cpu"), steps_per_epoch=4)
    reporter.start(6, 10)
    clock.now += 2.0
    reporter.step(7, result())
    clock.now += 1.0
    with reporter.paused():
        clock.now += 50.0  # saving or sampling is no part of a step
    clock.now += 3.0
    reporter.step(8, result())
    first, second = (event for event in events if event["type"] == "step")
    assert (first["step_time_s"], first["eta_s"]) == (2.0, 6.0)
    assert (second["step_time_s"], second["eta_s"]) == (3.0, 6.0)
    assert second["loss"] == 1.25
    assert second["terms"] == {"loss": 1.0, "extra": 0.25}
    assert second["epoch"] == 2.0
    assert second["rss_gib"] > 0
    assert "items_per_s" not in first


def test_throughput_is_items_of_an_epoch_over_its_steps(clock: Clock) -> None:
    events: list[Any] = []
    reporter = RunReporter(EventLog(events.append), torch.device("cpu"), 4, items_per_epoch=10)
    reporter.start(0, 10)
    clock.now += 2.0
    reporter.step(1, result())
    assert events[-1]["items_per_s"] == 1.25  # 2.5 items a step of 2 s


def test_peaks_are_the_highest_so_far(tmp_path: Path) -> None:
    ballast = torch.ones(64 * 2**20 // 4)
    assert ballast.sum() > 0
    write_peaks(tmp_path / "a.json", torch.device("cpu"))
    del ballast
    write_peaks(tmp_path / "b.json", torch.device("cpu"))
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert set(first) == {"peak_rss_gib"}
    assert second["peak_rss_gib"] >= first["peak_rss_gib"] > 0.064
