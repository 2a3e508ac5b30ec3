from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers.optimization
from pydantic import ValidationError

from trainer.contract.catalog import LR_SCHEDULES
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.optimizer_config import LRScheduleSection
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.jobs.train_parts import learning_rate
from trainer.training.lr import LearningRate

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=10
)


NEEDED: dict[str, dict[str, Any]] = {
    "piecewise": {"points": [[0.2, 1.0], [0.8, 0.25]]},
    "custom": {"class": "torch.optim.lr_scheduler.ExponentialLR", "arguments": {"gamma": 0.9}},
}


def rates(kind: str, total: int, warmup: int, **options: Any) -> list[float]:
    implementation: Any = LR_SCHEDULES.load(kind)
    schedule = implementation(implementation.Config(**NEEDED.get(kind, {}) | options), BUILD)
    rate = LearningRate(base=2.0, warmup_steps=warmup, total_steps=total, schedule=schedule)
    return [rate(step) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_full_rate() -> None:
    assert rates("constant", 6, 4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_ends_at_the_smallest_rate() -> None:
    assert rates("linear", 5, 0) == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert rates("linear", 6, 1, min_lr_ratio=0.5)[-1] == 1.0


def test_cosine_equals_torch() -> None:
    total = 9
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - 1)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates("cosine", total, 0) == pytest.approx(expected, abs=1e-12)


def from_transformers(name: str, steps: int, **options: Any) -> list[float]:
    """Return the rates of one of transformers' schedules, which would reach its end a step later
    than ours."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = getattr(transformers.optimization, name)(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


SAME: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    (
        "cosine_restarts",
        {"num_cycles": 3},
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_warmup_steps": 0, "num_training_steps": 60, "num_cycles": 3},
    ),
    (
        "polynomial",
        {"power": 3.0, "min_lr_ratio": 0.1},
        "get_polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": 0, "num_training_steps": 60, "power": 3.0, "lr_end": 0.2},
    ),
    (
        "inverse_sqrt",
        {"timescale_steps": 7},
        "get_inverse_sqrt_schedule",
        {"num_warmup_steps": 0, "timescale": 7},
    ),
    (
        "cosine",
        {"min_lr_ratio": 0.25},
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_warmup_steps": 0, "num_training_steps": 60, "min_lr_rate": 0.25},
    ),
    *[
        (
            "warmup_stable_decay",
            {"decay_ratio": 0.25, "decay_shape": ours, "min_lr_ratio": 0.2},
            "get_wsd_schedule",
            {
                "num_warmup_steps": 0,
                "num_training_steps": 60,
                "num_decay_steps": 15,
                "decay_type": theirs,
                "min_lr_ratio": 0.2,
            },
        )
        for ours, theirs in (
            ("linear", "linear"),
            ("cosine", "cosine"),
            ("one_minus_sqrt", "1-sqrt"),
        )
    ],
]


@pytest.mark.parametrize(("kind", "ours", "name", "theirs"), SAME, ids=str)
def test_equals_transformers(kind, ours, name, theirs) -> None:
    expected = from_transformers(name, 61, **theirs)
    if kind == "cosine_restarts":  # they jump to 0 at the end of their run only
        expected = [*expected[:-1], 0.0]
    assert rates(kind, 61, 0, **ours) == pytest.approx(expected, abs=1e-12)


def test_restarts_may_begin_lower_each_time() -> None:
    values = rates("cosine_restarts", 41, 0, num_cycles=4, cycle_decay=0.5, min_lr_ratio=0.1)
    assert values[::10] == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.2])
    assert min(values) >= 0.2


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_rex_is_the_formula(alpha) -> None:
    left = 1 - np.arange(21, dtype=np.float64) / 20
    expected = 2 * (0.01 + 0.99 * left / (alpha + (1 - alpha) * left))
    assert rates("rex", 21, 0, alpha=alpha, min_lr_ratio=0.01) == pytest.approx(list(expected))


def test_inverse_sqrt_has_a_floor_and_does_not_depend_on_the_length() -> None:
    short, long = (rates("inverse_sqrt", n, 2, timescale_steps=5) for n in (20, 200))
    assert long[:20] == pytest.approx(short)
    assert min(rates("inverse_sqrt", 200, 2, timescale_steps=5, min_lr_ratio=0.5)) == 1.0


def test_piecewise_goes_through_its_points() -> None:
    points = [[0.25, 1.0], [0.5, 0.0], [0.75, 0.5]]
    lines = rates("piecewise", 9, 0, points=points)
    assert lines == [2.0, 2.0, 2.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    steps = rates("piecewise", 9, 0, points=points, shape="steps")
    assert steps == [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[0.5, 1.0], [0.2, 0.5]], "larger progress"),
        ([[1.5, 1.0]], "from 0 to 1"),
        ([[0.5, -1.0]], "0 or more"),
        ([[0.5, 1.0, 2.0]], "at most 2"),
        ([], "at least 1"),
    ],
)
def test_points_that_are_no_course_are_refused(points, words) -> None:
    with pytest.raises(ValidationError, match=words):
        rates("piecewise", 5, 0, points=points)


@pytest.mark.parametrize("kind", ["MultiStepLR", "OneCycleLR", "CosineAnnealingWarmRestarts"])
def test_a_class_of_torch_gives_its_own_course(kind) -> None:
    arguments: dict[str, Any] = {
        "MultiStepLR": {"milestones": [3, 7], "gamma": 0.5},
        "OneCycleLR": {"max_lr": 1.0, "total_steps": 12},
        "CosineAnnealingWarmRestarts": {"T_0": 4},
    }[kind]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    schedule = getattr(torch.optim.lr_scheduler, kind)(optimizer, **arguments)
    expected = []
    for step in range(12):
        expected.append(2 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 11:
            schedule.step()
    path = f"torch.optim.lr_scheduler.{kind}"
    assert rates("custom", 12, 0, **{"class": path}, arguments=arguments) == expected


@pytest.mark.parametrize(
    ("path", "arguments", "words"),
    [
        ("torch.optim.lr_scheduler.StepLRR", {}, "did you mean 'StepLR'"),
        ("torch.optim.lr_scheduler.StepLR", {"step_sise": 3}, "did you mean 'step_size'"),
        ("torch.optim.lr_scheduler.StepLR", {}, "needs the argument 'step_size'"),
        ("torch.optim.lr_scheduler.StepLR", {"step_size": "x"}, "refuses its arguments|ends after"),
        ("torch.optim.lr_scheduler.StepLR", {"optimizer": 3, "step_size": 1}, "set by Menma"),
        ("torch.optim.SGD", {}, "something else"),
        ("no_such_package.Thing", {}, "no package no_such_package is installed"),
        ("torch.no_such_module.Thing", {}, "cannot be imported"),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "total_steps": 5}, "ends after"),
        ("torch.optim.lr_scheduler.ConstantLR", {"factor": -1.0}, "."),
    ],
)
def test_classes_that_do_not_do_are_refused(path, arguments, words) -> None:
    with pytest.raises(ConfigError) as caught:
        rates("custom", 12, 0, **{"class": path}, arguments=arguments)
    told = " ".join(f"{p.message} {p.hint}" for p in caught.value.problems)
    assert re.search(words, told), told
    assert all(p.key.startswith("lr_schedule.") for p in caught.value.problems)


def test_a_package_of_the_working_directory_is_not_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="lies in the working directory"):
        rates("custom", 12, 0, **{"class": "mine.Schedule"})


def test_warm_up_as_a_share_of_all_steps() -> None:
    assert LRScheduleSection(warmup_ratio=0.1).warmup_of(250) == 25
    assert LRScheduleSection(warmup_steps=7).warmup_of(250) == 7
    config = RunConfig.model_validate({"lr_schedule": {"warmup_ratio": 0.5}})
    rate = learning_rate(config, BUILD)
    assert [rate(step) / 1e-4 for step in range(1, 8)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    )


@pytest.mark.parametrize("kind", LR_SCHEDULES.names)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9), (50, 3)])
def test_rates_are_finite_and_bounded(kind: str, total: int, warmup: int) -> None:
    values = rates(kind, total, warmup)
    assert len(values) == total
    assert all(math.isfinite(value) and 0 <= value <= 2 for value in values)
