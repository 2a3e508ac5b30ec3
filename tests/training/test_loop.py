"""The loop's order of events, with every collaborator replaced by a recorder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from trainer.core.seams import Technique
from trainer.core.types import StepResult
from trainer.loop import End, Run, train
from trainer.training.plan import Interval, Plan
from trainer.training.requests import Requested


class Recorder:
    def __init__(self, resume_at: int = 0, requests: dict[int, Requested] | None = None) -> None:
        self.log: list[str] = []
        self.resume_at = resume_at
        self.wanted = requests or {}
        self.current = 0

    # engine
    def forward_backward(self, batches: Iterable[Any]) -> dict[str, float]:
        self.current = next(iter(batches))
        self.log.append(f"train {self.current}")
        return {"loss": 1.0, "extra": 0.5}

    def update(self, lr: float) -> StepResult:
        return StepResult(terms={}, grad_norm=2.0, lr=lr)

    # steps
    def starting_at(self, step: int) -> Iterator[list[int]]:
        while True:
            step += 1
            yield [step]

    # keeper
    def restore(self) -> int:
        return self.resume_at

    def checkpoint(self, step: int) -> None:
        self.log.append(f"checkpoint {step}")

    def output(self, step: int, *, final: bool) -> None:
        self.log.append(f"output {step}{' final' if final else ''}")

    def validate(self, step: int) -> None:
        self.log.append(f"validate {step}")

    def sample(self, step: int) -> None:
        self.log.append(f"sample {step}")

    # reporter
    def start(self, step: int, total_steps: int) -> None:
        self.log.append(f"start {step}/{total_steps}")

    def step(self, step: int, result: StepResult) -> None:
        assert result.loss == 1.5
        assert result.lr == step * 0.1

    # requests
    def poll(self) -> Requested:
        return self.wanted.get(self.current, Requested())

    def answer(self, step: int) -> None:
        if step in self.wanted:
            self.log.append(f"answer {step}")


def every(steps: int) -> Interval:
    return Interval(steps=steps)


def run(recorder: Recorder, **plan: Any) -> tuple[End, list[str]]:
    parts: Any = recorder
    end = train(
        Run(
            engine=parts,
            steps=parts,
            lr_at=lambda step: step * 0.1,
            techniques=(Technique(),),
            plan=Plan(**plan),
            keeper=parts,
            reporter=parts,
            requests=parts,
        )
    )
    return end, recorder.log


def test_everything_is_due_when_the_plan_says() -> None:
    end, log = run(
        Recorder(),
        total_steps=4,
        checkpoint=every(2),
        output=every(3),
        sample=every(2),
        sample_at_start=True,
    )
    assert end is End.DONE
    assert log == [
        "start 0/4", "sample 0",
        "train 1",
        "train 2", "checkpoint 2", "sample 2",
        "train 3", "output 3",
        "train 4", "checkpoint 4", "sample 4",
        "output 4 final",
    ]  # fmt: skip


def test_validation_follows_saving_and_the_last_step_in_any_case() -> None:
    plan = {
        "total_steps": 5,
        "validation": every(2),
        "validate_at_start": True,
        "checkpoint": every(2),
    }
    _, log = run(Recorder(), **plan, sample=every(2))
    assert [entry for entry in log if not entry.startswith("train")] == [
        "start 0/5", "validate 0",
        "checkpoint 2", "validate 2", "sample 2",
        "checkpoint 4", "validate 4", "sample 4",
        "checkpoint 5", "validate 5", "output 5 final",
    ]  # fmt: skip
    _, resumed = run(Recorder(resume_at=4), **plan)
    assert resumed == ["start 4/5", "train 5", "checkpoint 5", "validate 5", "output 5 final"]
    _, without = run(Recorder(), total_steps=2)
    assert "validate 2" not in without


def test_epochs_end_at_the_first_step_after_them() -> None:
    """Of 5 microbatches, 2 a step: epochs end within steps 3, 5, 8, 10, 13, 15."""
    epochs = {
        "output": Interval(epochs=1, epoch_after=lambda step: 2 * step / 5),
        "sample": Interval(steps=4, epochs=2, epoch_after=lambda step: 2 * step / 5),
    }
    _, log = run(Recorder(), total_steps=16, **epochs)
    written = [int(entry.split()[1]) for entry in log if entry.startswith("output")]
    assert written == [3, 5, 8, 10, 13, 15, 16]
    assert [entry for entry in log if entry.startswith("sample")] == [
        f"sample {step}" for step in (4, 5, 8, 10, 12, 15, 16)
    ]
    _, resumed = run(Recorder(resume_at=8), total_steps=16, **epochs)
    assert resumed[1:] == log[log.index("train 9") :]
    # Several epochs in one step are one occasion.
    _, short = run(
        Recorder(), total_steps=3, output=Interval(epochs=2, epoch_after=lambda s: 5 * s)
    )
    assert [entry for entry in short if entry.startswith("output")] == [
        "output 1", "output 2", "output 3 final",
    ]  # fmt: skip


def test_what_the_rate_goes_by_is_measured_before_it_is_saved() -> None:
    plan = {"total_steps": 3, "validation": every(2), "checkpoint": every(2)}
    _, log = run(Recorder(), **plan, validate_first=True)
    assert [entry for entry in log if not entry.startswith("train")] == [
        "start 0/3", "validate 2", "checkpoint 2", "validate 3", "checkpoint 3", "output 3 final",
    ]  # fmt: skip


def test_the_last_step_writes_one_output() -> None:
    _, log = run(Recorder(), total_steps=4, output=every(2))
    assert [entry for entry in log if entry.startswith("output")] == ["output 2", "output 4 final"]


def test_resuming_goes_on_with_the_next_step_and_does_not_sample_the_start_again() -> None:
    _, log = run(Recorder(resume_at=2), total_steps=3, sample_at_start=True)
    assert log == ["start 2/3", "train 3", "checkpoint 3", "output 3 final"]


def test_a_finished_run_only_writes_its_output() -> None:
    end, log = run(Recorder(resume_at=3), total_steps=3)
    assert end is End.DONE
    assert log == ["start 3/3", "output 3 final"]


def test_stop_saves_answers_and_leaves_without_a_final_output() -> None:
    end, log = run(Recorder(requests={2: Requested(stop=True)}), total_steps=5)
    assert end is End.STOPPED
    assert log == ["start 0/5", "train 1", "train 2", "checkpoint 2", "answer 2"]


def test_stop_at_the_last_step_is_a_finished_run() -> None:
    end, log = run(Recorder(requests={2: Requested(stop=True)}), total_steps=2)
    assert end is End.DONE
    assert log[-1] == "output 2 final"


@pytest.mark.parametrize("what", ["save", "sample"])
def test_requests_are_served_once_and_training_goes_on(what: str) -> None:
    asked = Requested(**{what: True})
    _, log = run(Recorder(requests={1: asked}), total_steps=2)
    served = {"save": "checkpoint 1", "sample": "sample 1"}[what]
    assert log[:4] == ["start 0/2", "train 1", served, "answer 1"]
    assert log.count(served) == 1
