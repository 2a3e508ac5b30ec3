"""The estimate of a run with both experts, against that of one."""

from __future__ import annotations

from typing import Any

import pytest
from memory_configs import make_config

from app.render.estimates import summary
from trainer.contract.memory_model import Estimate, estimate
from trainer.contract.memory_model.workload import workload_of

A14B = "wan2.2-t2v-a14b"
GIB = 2**30


def found(expert: str, **sections: Any) -> Estimate:
    sections["model"] = {"expert": expert}
    return estimate(make_config(A14B, **sections), "RTX 4090")


@pytest.mark.parametrize("swapped", [0, 30])
def test_the_idle_expert_is_in_ram_and_not_on_the_gpu(swapped: int) -> None:
    memory = {"blocks_to_swap": swapped, "weight_format": "fp8_scaled"}
    one, both, shared = (found(e, memory=memory) for e in ("low_noise", "both", "shared"))
    work = workload_of(make_config(A14B, memory=memory, model={"expert": "both"}))
    ours, theirs = both.phase("training").parts, one.phase("training").parts
    assert ours["weights"] == theirs["weights"]
    assert ours.get("block swap") == theirs.get("block swap")
    # Two adapters stand there, one of them gets gradients.
    for part in ("adapter", "optimizer"):
        assert ours[part] == pytest.approx(2 * theirs[part], rel=1e-6)
    assert ours.get("gradients") == theirs.get("gradients")
    assert shared.phase("training").parts == theirs
    for result in (both, shared):
        waiting = result.host_parts["parked experts"] + result.host_parts.get("swapped blocks", 0)
        assert waiting == pytest.approx(2 * work.weight_bytes, rel=1e-6)
    assert "parked experts" not in one.host_parts


def test_disk_holds_two_of_everything() -> None:
    one, both, shared = (found(e) for e in ("high_noise", "both", "shared"))
    for part in ("checkpoints", "outputs"):
        assert both.disk_parts[part] == pytest.approx(2 * one.disk_parts[part], rel=1e-6)
        assert shared.disk_parts[part] == one.disk_parts[part]


def test_samples_need_no_room_for_the_other_expert() -> None:
    sampling = {"every_steps": 10, "prompts": [{"prompt": "x"}]}
    one, both = (found(e, sampling=sampling) for e in ("high_noise", "both"))
    assert "other expert" in one.phase("sampling").parts
    assert "other expert" not in both.phase("sampling").parts
    assert "parked expert" not in both.host_parts


def test_changes_of_the_expert_take_time_by_their_number() -> None:
    def seconds(share: float, group: int) -> float:
        experts = {"high_noise_share": share, "steps_per_turn": group}
        return found("both", experts=experts).step_parts["change of the expert"]

    assert seconds(0.5, 10) == pytest.approx(2 * seconds(0.5, 20))
    assert seconds(0.1, 10) == pytest.approx(seconds(0.5, 10) / 5)
    assert seconds(0.9, 10) == pytest.approx(seconds(0.1, 10))
    # Half and half in turns of 10: one copy of an expert in ten steps.
    card = found("both").gpu
    assert card is not None
    weights = workload_of(make_config(A14B)).weight_bytes
    assert seconds(0.5, 10) == pytest.approx(weights / (card.host_gb_s * 1e9) / 10, rel=1e-3)
    assert "change of the expert" not in found("high_noise").step_parts


def test_the_share_is_told() -> None:
    both = found("both", objective={"flow_shift": 7.0})
    assert both.to_json()["experts"] == {"high_noise_share": 0.5, "steps_per_turn": 20}
    assert "Experts: high_noise 50.0% of the steps" in "\n".join(summary(both))
    one = found("high_noise")
    assert one.to_json()["experts"] is None
    assert "Experts" not in "\n".join(summary(one))
