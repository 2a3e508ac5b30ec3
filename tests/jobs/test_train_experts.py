"""Two experts put together: who is told what, measured where, and fed with which batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from trainer.contract.expert_turns import Turns
from trainer.core.seams import Technique
from trainer.jobs.train_experts import AlternatingSteps, ExpertValidator, WhoseTurn
from trainer.memory.parking import OneAtATime
from trainer.memory.streams import HostStreams
from trainer.training.validation import ValidationResult

TURNS = Turns(steps_per_turn=2, high_noise_share=0.5)
ORDER = "hhllhhll"


class Counting(Technique):
    """Notes which steps it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, step: int) -> None:
        self.steps.append(step)


def test_techniques_count_the_steps_of_their_own_expert() -> None:
    high, low = Counting(), Counting()
    told = WhoseTurn({"high_noise": (high,), "low_noise": (low,)}, TURNS)
    for step in range(1, 8):
        told.after_step(step)
    assert (high.steps, low.steps) == ([1, 2, 3, 4], [1, 2, 3])


class Numbers:
    """Steps of a run: their numbers; notes what is closed."""

    def __init__(self) -> None:
        self.open = 0

    def starting_at(self, step: int) -> Iterator[int]:
        self.open += 1
        try:
            while True:
                step += 1
                yield step
        finally:
            self.open -= 1


@pytest.mark.parametrize("start", range(8))
def test_each_expert_goes_through_the_data_on_its_own(start: int) -> None:
    numbers = Numbers()
    steps: Any = AlternatingSteps(numbers, TURNS)  # type: ignore[arg-type]
    with closing(steps.starting_at(start)) as batches:
        found = [next(batches) for _ in range(8 - start)]
        assert numbers.open
    wanted = [ORDER[: step + 1].count(ORDER[step]) for step in range(8)]
    assert found == wanted[start:]
    assert not numbers.open, "whatever reads ahead has ended"


class Fixed:
    """Measures what it is told to."""

    def __init__(self, stage: OneAtATime, name: str, losses: dict[float, float]) -> None:
        self.stage, self.name, self.losses = stage, name, losses

    def measure(self) -> ValidationResult:
        assert self.stage.working == self.name
        mean = sum(self.losses.values()) / len(self.losses)
        return ValidationResult(loss=mean, by_timestep=self.losses, num_items=3, seconds=0.5)


@pytest.mark.parametrize("working", ["high_noise", "low_noise"])
def test_the_loss_is_the_mean_over_all_timesteps(working: str) -> None:
    brought: list[str] = []

    class Stage(OneAtATime):
        def bring(self, name: str) -> None:
            brought.append(name)
            self.working = name

    stage = Stage(HostStreams())
    stage.working = working
    validators: Any = {
        "high_noise": Fixed(stage, "high_noise", {950.0: 4.0}),
        "low_noise": Fixed(stage, "low_noise", {100.0: 1.0, 500.0: 1.5}),
    }
    result = ExpertValidator(stage, validators).measure()
    assert brought[0] == working, "no copy for the one that is there"
    assert len(brought) == 2
    assert list(result.by_timestep.items()) == [(100.0, 1.0), (500.0, 1.5), (950.0, 4.0)]
    assert result.loss == pytest.approx(6.5 / 3)
    assert (result.num_items, result.seconds) == (3, 1.0)
