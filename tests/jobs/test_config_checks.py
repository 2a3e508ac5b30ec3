"""What `check` says of batches, by counts alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.contract.config import RunConfig
from trainer.data.order import Group
from trainer.jobs.config_checks import batch_problems


def processes_asked_for(folder: Path, num_batches: int, **distributed: object) -> str:
    """Return what is wrong with one group of so many batches; "" for nothing."""
    hosts = folder / "hosts"
    hosts.write_text("one slots=3\ntwo slots=3\n")
    if distributed.pop("machines", False):
        distributed["hostfile"] = hosts
    config = RunConfig.model_validate(
        {
            "name": "x",
            "distributed": distributed,
            "training": {"gradient_accumulation_steps": 2},
        }
    )
    group = Group(appearances=num_batches, batch_size=1, num_repeats=1)
    return "; ".join(str(problem) for problem in batch_problems(config, [group]))


@pytest.mark.parametrize(
    ("distributed", "needed"),
    [
        ({"num_processes": 1}, 2),
        ({"num_processes": 4}, 8),
        ({"num_processes": 4, "sequence_parallel": 2}, 4),
        ({"num_processes": 4, "sequence_parallel": 4}, 2),
        ({"machines": True}, 12),
        ({"machines": True, "sequence_parallel": 3}, 4),
    ],
)
def test_an_epoch_is_a_step_of_all_processes_at_least(tmp_path, distributed, needed):
    assert processes_asked_for(tmp_path, needed, **distributed) == ""
    assert f"one step takes: {needed}" in processes_asked_for(tmp_path, needed - 1, **distributed)
