"""What `[distributed]` refuses about offload: key, reason, way out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.offload_rules import OPTIMIZER_KEY, PARAMETERS_KEY, PATH_KEY
from trainer.jobs import distributed_checks
from trainer.jobs.distributed_checks import distributed_problems

NVME = {"offload_optimizer": "nvme", "zero_stage": 3, "nvme_path": "ssd"}


def config_of(distributed: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"distributed": distributed, **sections})


@pytest.mark.parametrize(
    ("distributed", "key", "words"),
    [
        ({"offload_optimizer": "cpu"}, OPTIMIZER_KEY, "zero_stage is 0"),
        (NVME | {"zero_stage": 1}, OPTIMIZER_KEY, "ZeRO-1 keeps offloaded state in RAM"),
        (NVME | {"zero_stage": 2}, OPTIMIZER_KEY, "ZeRO-2 keeps offloaded state in RAM"),
        ({"offload_parameters": "cpu"}, PARAMETERS_KEY, "only ZeRO-3"),
        ({"offload_parameters": "cpu", "zero_stage": 2}, PARAMETERS_KEY, "zero_stage is 2"),
        (NVME | {"nvme_path": None}, PATH_KEY, "not given"),
        (
            {"offload_parameters": "nvme", "zero_stage": 3, "nvme_path": "ssd"},
            PARAMETERS_KEY,
            "one dtype",
        ),
        ({"nvme_path": "ssd"}, PATH_KEY, "only where something is offloaded"),
        (
            {"nvme_path": "ssd", "offload_optimizer": "cpu", "zero_stage": 2},
            PATH_KEY,
            "only where something is offloaded",
        ),
        ({"engine": "local", "offload_optimizer": "cpu"}, OPTIMIZER_KEY, "local engine"),
        ({"engine": "local", "offload_parameters": "cpu"}, PARAMETERS_KEY, "local engine"),
    ],
)
def test_what_excludes_one_another_is_told(
    distributed: dict[str, Any], key: str, words: str
) -> None:
    problems = check_rules(config_of(distributed))
    assert [(problem.key, words in problem.message) for problem in problems] == [(key, True)]
    assert problems[0].hint


def test_8_bit_states_stay_on_the_gpu() -> None:
    config = config_of(
        {"offload_optimizer": "cpu", "zero_stage": 2}, optimizer={"kind": "adamw8bit"}
    )
    (problem,) = check_rules(config)
    assert (problem.key, "GPU" in problem.message) == ("optimizer.kind", True)


@pytest.mark.parametrize(
    "distributed",
    [
        *({"offload_optimizer": "cpu", "zero_stage": stage} for stage in (1, 2, 3)),
        {"offload_parameters": "cpu", "zero_stage": 3},
        {"offload_optimizer": "cpu", "offload_parameters": "cpu", "zero_stage": 3},
        NVME,
        NVME | {"offload_parameters": "cpu"},
    ],
)
def test_what_goes_together_is_taken(distributed: dict[str, Any]) -> None:
    assert check_rules(config_of(distributed)) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"kind": "none"}},
        {"memory": {"weight_format": "fp32"}},
        {"adapter": {"kind": "none"}, "memory": {"weight_format": "fp32"}},
    ],
)
def test_weights_of_one_dtype_may_lie_in_files(sections: dict[str, Any]) -> None:
    assert check_rules(config_of(NVME | {"offload_parameters": "nvme"}, **sections)) == []
    problems = check_rules(config_of({"offload_parameters": "nvme", "zero_stage": 3}, **sections))
    assert [problem.key for problem in problems] == [PATH_KEY]


def test_the_folder_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_checks, "async_io_obstacle", lambda device: None)

    def told(path: Path) -> list[tuple[str, str]]:
        config = config_of(NVME | {"nvme_path": str(path), "device": "cpu"})
        return [(problem.key, problem.message) for problem in distributed_problems(config)]

    (tmp_path / "file").touch()
    assert told(tmp_path) == []
    assert told(tmp_path / "no") == [(PATH_KEY, f"{tmp_path / 'no'} does not exist")]
    assert told(tmp_path / "file") == [(PATH_KEY, f"{tmp_path / 'file'} is not a folder")]
    monkeypatch.setattr(distributed_checks.os, "access", lambda path, mode: False)
    assert told(tmp_path) == [(PATH_KEY, f"{tmp_path} cannot be written to")]


def test_what_the_machine_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_checks, "async_io_obstacle", lambda device: "no libaio")
    config = config_of(NVME | {"nvme_path": str(tmp_path), "device": "cpu"})
    (problem,) = distributed_problems(config)
    assert problem.key == OPTIMIZER_KEY
    assert "no libaio" in problem.message
    assert distributed_problems(config_of({})) == []

    monkeypatch.setattr(distributed_checks, "engine_kind", lambda config: "local")
    config = config_of({"offload_optimizer": "cpu", "zero_stage": 2})
    (problem,) = distributed_problems(config)
    assert "not installed" in problem.message
    monkeypatch.setattr(sys, "platform", "win32")
    (problem,) = distributed_problems(config)
    assert (problem.key, "Windows" in problem.message) == (OPTIMIZER_KEY, True)
