"""What `distributed.sequence_parallel` goes with: key, reason and values that would do."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.sequence_rules import divisors

KEY = "distributed.sequence_parallel"


def problems_of(variant: str = "auto", **distributed: Any) -> list[Any]:
    sections: dict[str, Any] = {"distributed": distributed, "model": {"variant": variant}}
    if "a14b" in variant:
        sections["model"]["expert"] = "low_noise"
    return check_rules(RunConfig.model_validate(sections))


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"sequence_parallel": 2, "engine": "local"}, "the local engine", 'engine = "deepspeed"'),
        (
            {"sequence_parallel": 4, "num_processes": 6},
            "num_processes = 6",
            "one of 1, 2, 3, 6",
        ),
        (
            {"sequence_parallel": 2, "num_processes": 1},
            "num_processes = 1",
            "a multiple of 2",
        ),
        (
            {"sequence_parallel": 8, "variant": "wan2.1-t2v-1.3b"},
            "the 12 attention heads",
            "one of 1, 2, 3, 4, 6, 12",
        ),
        ({"sequence_parallel": 3, "variant": "wan2.2-t2v-a14b"}, "the 40", "1, 2, 4, 5, 8, 10"),
        ({"sequence_parallel": 5, "variant": "wan2.2-ti2v-5b"}, "the 24", "1, 2, 3, 4, 6, 8"),
    ],
)
def test_refused(given: dict[str, Any], message: str, hint: str) -> None:
    (problem,) = problems_of(**given)
    assert problem.key == KEY
    assert message in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_processes": 3},
        {"sequence_parallel": 2},
        {"sequence_parallel": 2, "num_processes": 6, "variant": "wan2.1-t2v-1.3b"},
        {"sequence_parallel": 8, "num_processes": 8, "variant": "wan2.1-t2v-14b"},
        {"sequence_parallel": 8, "hostfile": "hosts"},
        {"sequence_parallel": 8, "variant": "wan2.2-ti2v-5b"},
    ],
)
def test_allowed(given: dict[str, Any]) -> None:
    assert problems_of(**given) == []


def test_a_shape_of_ones_own_counts() -> None:
    model = {"variant": "wan2.1-t2v-1.3b", "shape": {"num_heads": 16}}
    sections = {"distributed": {"sequence_parallel": 8}, "model": model}
    assert check_rules(RunConfig.model_validate(sections)) == []
    sections["distributed"]["sequence_parallel"] = 3
    (problem,) = check_rules(RunConfig.model_validate(sections))
    assert "the 16 attention heads" in problem.message


def test_divisors() -> None:
    assert divisors(24) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert divisors(1) == [1]
