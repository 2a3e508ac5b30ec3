"""TensorBoard and W&B get the figures of the events."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.contract.config import LoggingSection, RunConfig
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.figures import figures_of
from trainer.contract.run_dir import RunDir
from trainer.training.figure_sinks import TensorBoardSink, figure_sinks
from trainer.training.reporter import EventLog


def test_figures_have_one_name_everywhere() -> None:
    step = {
        "v": 1, "time": 5.0, "type": "step", "step": 3, "total_steps": 9, "eta_s": 1.0,
        "loss": 0.5, "terms": {"loss": 0.25, "extra": 0.25}, "note": "x", "flag": True, "lr": None,
    }  # fmt: skip
    assert figures_of(step) == {
        "train/loss": 0.5, "train/terms/loss": 0.25, "train/terms/extra": 0.25,
    }  # fmt: skip
    validation = {"type": "validation", "step": 3, "loss": 1.0, "by_timestep": {"100": 2.0}}
    assert figures_of(validation) == {"validation/loss": 1.0, "validation/timestep_100": 2.0}
    assert figures_of({"type": "sample", "step": 3, "seed": 4}) == {}
    assert figures_of({"type": "step", "loss": 1.0}) == {}


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


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a stand-in for the package, which notes what it is told."""
    told: dict[str, Any] = {"defined": [], "logged": [], "finished": []}
    run = SimpleNamespace(
        define_metric=lambda *a, **k: told["defined"].append((a, k)),
        log=told["logged"].append,
        finish=lambda exit_code: told["finished"].append(exit_code),  # noqa: PLW0108
    )
    module = SimpleNamespace(
        init=lambda **options: told.setdefault("inits", []).append(options) or run,
        told=told,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def config(**logging: Any) -> RunConfig:
    return RunConfig(logging=LoggingSection(**logging))


def test_wandb_gets_figures_config_and_the_end(tmp_path: Path, wandb: SimpleNamespace) -> None:
    run_dir = RunDir(tmp_path / "fish")
    asked = config(
        wandb=True, wandb_project="wan", wandb_entity="team", wandb_mode="offline",
        webhook="https://example.org/secret-token",
    )  # fmt: skip
    for _ in range(2):  # started, then resumed: the same W&B run
        (sink,) = figure_sinks(asked, run_dir)
        emit = EventLog(sink)
        emit("step", step=3, loss=0.5, lr=0.1)
        emit("log", message="not a figure")
        emit("end", reason="failed", step=3)
    first, second = wandb.told["inits"]
    assert first["id"] == second["id"]
    assert len(first["id"]) == 12
    assert (first["project"], first["entity"], first["mode"]) == ("wan", "team", "offline")
    assert (first["name"], first["resume"]) == ("fish", "allow")
    assert first["config"]["training"]["seed"] == asked.training.seed
    assert "secret-token" not in str(first)
    assert (("*",), {"step_metric": "step"}) in wandb.told["defined"]
    assert wandb.told["logged"][0] == {"train/loss": 0.5, "train/lr": 0.1, "step": 3}
    assert wandb.told["finished"] == [1, 1]


def test_wandb_that_refuses_is_told_in_words(tmp_path: Path, wandb: SimpleNamespace) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("no API key")

    wandb.init = refuse
    with pytest.raises(RunError, match="no API key") as caught:
        figure_sinks(config(wandb=True), RunDir(tmp_path))
    assert "wandb login" in caught.value.hint


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb package"):
        figure_sinks(config(wandb=True), RunDir(tmp_path))
    assert figure_sinks(config(), RunDir(tmp_path)) == []
