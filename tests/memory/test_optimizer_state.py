"""State of optimizers in the estimate, against the tensors that they really keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from memory_configs import make_config

from tests.engine.optimizer_runs import IN_FLOAT32, OPTIONS, QUICK, factory_of
from trainer.contract.memory_model.optimizers import OPTIMIZERS, state_bytes
from trainer.contract.memory_model.phases import training_parts
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.optimizer_traits import OPTIMIZERS as TRAITS

SHAPES = ((4, 96), (96, 4), (96,), (700,), (40, 50))


def tensors(held: Any) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict | list):
        for value in held.values() if isinstance(held, dict) else held:
            yield from tensors(value)


def measured(kind: str, dtype: torch.dtype, **options: Any) -> int:
    """Return the bytes of state, but for what does not grow with the weights."""
    weights = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = factory_of(kind, **options).build([{"params": weights}], lr=0.0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    once = {"qmap1", "qmap2"}  # tables of 8-bit values, shared by all tensors
    states = [{k: v for k, v in s.items() if k not in once} for s in optimizer.state.values()]
    return sum(tensor.nbytes for tensor in tensors(states) if tensor.ndim)


@pytest.mark.parametrize("kind", QUICK)
def test_the_estimate_counts_what_is_kept(kind):
    options = OPTIONS.get(kind, {})
    assert state_bytes(kind, options, SHAPES) == measured(kind, torch.float32)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adafactor", {"beta1": None}),
        ("soap", {"max_precondition_dim": 50}),
        ("adamw8bit", {"min_8bit_size": 500}),
        ("lion8bit", {"min_8bit_size": 500}),
    ],
)
def test_options_that_change_the_state_count(kind, options):
    assert state_bytes(kind, options, SHAPES) == measured(kind, torch.float32, **options)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_weights_in_bf16(rounding):
    found = measured("adamw_bf16", torch.bfloat16, rounding=rounding)
    assert state_bytes("adamw_bf16", {"rounding": rounding}, SHAPES) == found


def test_every_optimizer_is_in_the_table():
    assert set(OPTIMIZERS) == set(TRAITS)
    assert set(IN_FLOAT32) < set(OPTIMIZERS)


def parts(**sections: Any) -> dict[str, float]:
    config = make_config(**sections)
    return training_parts(workload_of(config))


def test_the_estimate_of_a_run_follows_the_optimizer():
    adamw, lion = parts(), parts(optimizer={"kind": "lion"})
    assert lion["optimizer"] == adamw["optimizer"] / 2
    assert parts(optimizer={"kind": "adafactor"})["optimizer"] < adamw["optimizer"] / 10


def test_bf16_weights_without_masters_take_less():
    full = {"adapter": {"kind": "none"}, "distributed": {"engine": "local"}}
    masters = parts(**full)
    without = parts(**full, optimizer={"kind": "adamw_bf16", "rounding": "stochastic"})
    assert "fp32 masters" in masters
    assert "fp32 masters" not in without
    assert without["optimizer"] == pytest.approx(masters["optimizer"])


def test_an_average_of_the_weights_counts_where_it_is():
    plain = parts()
    averaged = parts(ema={"decay": 0.99})
    assert averaged["average of weights"] == plain["optimizer"] / 2
    assert "average of weights" not in plain
    assert "average of weights" not in parts(ema={"decay": 0.99, "device": "cpu"})
