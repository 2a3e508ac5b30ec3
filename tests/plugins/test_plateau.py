"""The learning rate that goes by the losses: when it falls, and what a resumed run knows of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.plugins.test_lr import BUILD
from trainer.contract.catalog import LR_SCHEDULES
from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.core.seams import LossSchedule
from trainer.training.lr import LossWatch


def plateau(**options: Any) -> LossSchedule:
    implementation: Any = LR_SCHEDULES.load("plateau")
    schedule: LossSchedule = implementation(implementation.Config(**options), BUILD)
    return schedule


def factors(schedule: LossSchedule, losses: list[float]) -> list[float]:
    """Return the factor after each loss."""
    found = []
    for loss in losses:
        schedule.observe(loss)
        found.append(schedule.factor(0.3, 10))
    return found


def by_hand(
    losses: list[float],
    *,
    patience: int = 5,
    lr_factor: float = 0.5,
    threshold: float = 0.001,
    cooldown: int = 0,
    min_lr_ratio: float = 0.0,
) -> list[float]:
    """Return what the options' descriptions say, in plain words of Python."""
    best, missed, resting, factor, found = float("inf"), 0, 0, 1.0, []
    for loss in losses:
        if loss < best * (1 - threshold):
            best, missed = loss, 0
        else:
            missed += 1
        if resting:
            resting, missed = resting - 1, 0
        if missed > patience:
            factor = max(factor * lr_factor, min_lr_ratio)
            missed, resting = 0, cooldown
        found.append(factor)
    return found


LOSSES = [1.0, 0.9, 0.8999, 0.91, 0.89, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.699, 0.71, 0.3, 0.4,
          0.31, 0.5, 0.6, 0.29, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]  # fmt: skip
CHANGES: dict[str, Any] = {
    "patience": 1, "lr_factor": 0.1, "threshold": 0.5, "cooldown": 2, "min_lr_ratio": 0.6,
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, *({key: value} for key, value in CHANGES.items()), CHANGES]
)
def test_it_falls_when_the_best_is_missed_too_often(options: dict[str, Any]) -> None:
    options = {"patience": 2} | options
    found = factors(plateau(**options), LOSSES)
    assert found == by_hand(LOSSES, **options)
    assert min(found) < 1


@pytest.mark.parametrize("key", CHANGES)
def test_every_option_changes_the_course(key: str) -> None:
    plain = {"patience": 2}
    changed = factors(plateau(**(plain | {key: CHANGES[key]})), LOSSES)
    assert changed != factors(plateau(**plain), LOSSES)


def test_training_losses_count_by_their_means() -> None:
    options = {"patience": 0, "threshold": 0.0}
    schedule = plateau(watch="training", window_steps=3, **options)
    losses = [3.0, 1.0, 2.0, 9.0, 0.0, 0.0, 2.0, 2.0, 1.9, 5.0]  # means 2, 3, 1.97
    assert factors(schedule, losses) == [1.0] * 5 + [0.5] * 5
    assert schedule.watches == "training"


@pytest.mark.parametrize("watch", ["training", "validation"])
@pytest.mark.parametrize("at", [0, 1, 8, 13])
def test_a_resumed_run_goes_on_with_the_same_bits(watch: str, at: int) -> None:
    options = {"watch": watch, "patience": 1, "cooldown": 1, "lr_factor": 0.7, "window_steps": 2}
    whole, first, second = (plateau(**options) for _ in range(3))
    expected = factors(whole, LOSSES)
    factors(first, LOSSES[:at])
    factors(second, [0.001] * 9)  # what is loaded must replace all of this
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert factors(second, LOSSES[at:]) == expected[at:]
    assert second.state() == whole.state()


def test_the_warm_up_does_not_count() -> None:
    schedule = plateau(watch="training", window_steps=1, patience=0)
    watch = LossWatch(schedule=schedule, warmup_steps=3)
    for step, loss in enumerate([0.1, 0.2, 1.0, 0.9, 0.8], start=1):
        watch.trained(step, loss)
        watch.validated(step, 100.0)  # of no interest
    assert schedule.factor(0, 1) == 1.0
    watch.trained(6, 0.85)
    assert schedule.factor(0, 1) == 0.5


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({}, "lr_schedule.watch"),
        ({"validation": {"every_steps": 5, "split": 0.1}}, None),
        ({"validation": {"every_epochs": 1, "split": 0.1}}, None),
        ({"lr_schedule": {"kind": "plateau", "watch": "training", "window_steps": 5}}, None),
        (
            {
                "lr_schedule": {"kind": "plateau", "window_steps": 5},
                "validation": {"every_steps": 5, "split": 0.1},
            },
            "lr_schedule.window_steps",
        ),
        (
            {
                "model": {"variant": "wan2.2-t2v-a14b", "expert": "both"},
                "lr_schedule": {"kind": "plateau", "watch": "training"},
            },
            "lr_schedule.kind",
        ),
    ],
)
def test_what_it_goes_with(sections: dict[str, Any], key: str | None) -> None:
    config = RunConfig.model_validate({"lr_schedule": {"kind": "plateau"}} | sections)
    problems = [problem.key for problem in check_rules(config)]
    assert problems == ([] if key is None else [key])
