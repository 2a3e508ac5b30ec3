from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.core.types import StepResult
from trainer.training import reporter as module
from trainer.training.reporter import EventLog, RunReporter, TensorBoardSink, write_peaks


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


def test_tensorboard_gets_the_figures_of_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    emit = EventLog(TensorBoardSink(tmp_path))
    emit("log", message="not a figure")
    for step in (1, 2, 3):
        emit("step", step=step, total_steps=3, loss=step / 2, terms={"loss": step / 2}, lr=0.1)
    emit("validation", step=3, loss=2.5, by_timestep={"100": 2.0, "900": 3.0}, items=4)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    validation = {"validation/loss", "validation/timestep_100", "validation/timestep_900"}
    training = {"train/loss", "train/lr", "train/terms/loss"}
    assert set(log.Tags()["scalars"]) == training | validation
    assert [(s.step, s.value) for s in log.Scalars("validation/timestep_900")] == [(3, 3.0)]
    assert [(s.step, s.value) for s in log.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_steps_that_are_done_again_replace_their_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((1, (1, 2, 3, 4)), (2, (3, 4, 5))):  # killed at 4, resumed from 2
        emit = EventLog(TensorBoardSink(tmp_path))
        for step in steps:
            emit("step", step=step, total_steps=5, loss=float(10 * start + step))
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    figures = [(s.step, s.value) for s in log.Scalars("train/loss")]
    assert figures == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0)]


def test_peaks_are_the_highest_so_far(tmp_path: Path) -> None:
    ballast = torch.ones(64 * 2**20 // 4)
    assert ballast.sum() > 0
    write_peaks(tmp_path / "a.json", torch.device("cpu"))
    del ballast
    write_peaks(tmp_path / "b.json", torch.device("cpu"))
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert set(first) == {"peak_rss_gib"}
    assert second["peak_rss_gib"] >= first["peak_rss_gib"] > 0.064
