"""`menma schedule`: what it asks the trainer, and what it draws; and the job behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.render import courses
from app.render.curve import BRAILLE
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import REQUESTS
from trainer.jobs.schedule import MOST_POINTS, courses_of

POINTS = [[step, 1e-4 * step / 10] for step in range(1, 11)]
COURSE = {"expert": None, "steps": 10, "warmup_steps": 4, "points": POINTS}


@pytest.fixture
def answering(monkeypatch):
    """Let the stand-in trainer send these courses."""

    def answer(*found: dict[str, Any]) -> None:
        end = {"type": "end", "reason": "done", "kind": "linear", "courses": list(found)}
        monkeypatch.setenv("FAKE_EVENTS", json.dumps([end]))

    return answer


def test_it_draws_and_lists(menma, answering):
    answering(COURSE)
    Path("my.toml").write_text("")
    outcome = menma("schedule", "my.toml", "--steps", "10", "--set", "training.seed=1")
    assert outcome.code == 0, outcome
    content = json.loads(Path("request.json").read_text(encoding="utf-8"))
    request = REQUESTS[content["job"]].model_validate(content["request"])
    assert (content["job"], request.steps, request.set) == ("schedule", 10, ("training.seed=1",))
    lines = outcome.out.splitlines()
    assert lines[0].startswith("  0.0001 |")
    assert any(ord(char) > BRAILLE for char in outcome.out)
    assert max(map(len, lines)) <= 80
    assert lines[10].split() == ["1", "10"]
    assert [line.split() for line in lines[12:]] == [
        ["1", "1e-05"], ["2", "2e-05"], ["4", "4e-05"], ["5", "5e-05"], ["8", "8e-05"],
        ["10", "0.0001"],
    ]  # fmt: skip


def test_json_has_every_point_and_both_experts(menma, answering):
    answering({**COURSE, "expert": "high_noise"}, {**COURSE, "expert": "low_noise"})
    Path("my.toml").write_text("")
    found = json.loads(menma("schedule", "my.toml", "--json").out)
    assert [course["expert"] for course in found["courses"]] == ["high_noise", "low_noise"]
    assert found["courses"][0]["points"] == POINTS


def test_a_flat_course_and_one_of_a_step_can_be_drawn():
    for points in ([(1, 1e-4)], [(1, 0.0), (2, 0.0)]):
        lines = list(courses.drawing(points, 40, 5))
        assert len(lines) == 6
        assert all(len(line) <= 40 for line in lines)


def course_of(steps: int | None = None, **sections: Any) -> Any:
    return list(courses_of(RunConfig.model_validate(sections), steps))


def test_the_course_is_that_of_the_training():
    schedule = {"kind": "linear", "warmup_ratio": 0.2}
    (course,) = course_of(lr_schedule=schedule, training={"max_steps": 11})
    assert (course.steps, course.warmup_steps) == (11, 2)
    rates = [rate / 1e-4 for _, rate in course.points()]
    assert rates == pytest.approx([0.5, 1, *(1 - step / 8 for step in range(9))])


def test_long_courses_are_told_in_part():
    (course,) = course_of(9999, lr_schedule={"warmup_steps": 777})
    steps = [step for step, _ in course.points()]
    assert (steps[0], steps[-1]) == (1, 9999)
    assert {777, 2500, 5000} <= set(steps)
    assert steps == sorted(set(steps))
    assert len(steps) <= MOST_POINTS + 4


def test_restarts_of_relora_are_in_it():
    adapter = {"kind": "relora", "restart_every_steps": 4, "restart_warmup_steps": 2}
    (course,) = course_of(8, adapter=adapter)
    assert [round(rate / 1e-4, 3) for _, rate in course.points()] == [1, 1, 1, 1, 0.5, 1, 1, 1]


def test_each_expert_has_its_own_rate_and_steps():
    model = {"variant": "wan2.2-t2v-a14b", "expert": "both"}
    experts = {"high_noise_share": 0.25, "steps_per_turn": 1}
    high, low = course_of(8, model=model, experts=experts, high_noise={"learning_rate": 1e-3})
    assert (high.name, high.steps, low.name, low.steps) == ("high_noise", 2, "low_noise", 6)
    assert (high.rate(1), low.rate(1)) == (1e-3, 1e-4)
    shared = course_of(8, model=model | {"expert": "shared"}, experts=experts)
    assert [course.steps for course in shared] == [8, 8]
    (alone,) = course_of(
        8, model=model | {"expert": "high_noise"}, high_noise={"learning_rate": 1e-3}
    )
    assert (alone.name, alone.rate(1)) == ("high_noise", 1e-3)


def test_epochs_need_a_number_of_steps():
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        course_of(training={"epochs": 3})
    assert course_of(5, training={"epochs": 3})[0].steps == 5
