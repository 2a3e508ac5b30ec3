"""State and weights in files: equal to those in RAM, resumable both ways, nothing left behind.

DeepSpeed compiles its module for files for many minutes, so these tests run where that is done:
`python -c "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.compiled_ops import is_built
from tests.engine.toy import (
    AdamWFactory,
    LoraStep,
    RawAdamWFactory,
    WideStep,
    batches_of_step,
)
from trainer.contract.errors import ConfigError
from trainer.engine.deepspeed import DeepSpeedEngine, async_io_obstacle
from trainer.engine.offload import NO_OFFLOAD, Offload

CPU = torch.device("cpu")
WIDTH = 768


needs_files = pytest.mark.skipif(
    not is_built("async_io"), reason="DeepSpeed's async_io is not compiled on this machine"
)


@pytest.fixture
def make(world):
    """Return a maker of ZeRO-3 engines and close them afterwards."""
    made = []

    def make_engine(dtype, offload, module=None, factory=None):
        module = module or WideStep(dtype, width=WIDTH)
        engine = DeepSpeedEngine(
            module,
            module.trainable(),
            factory or AdamWFactory(),
            world=world,
            max_grad_norm=0.0,
            gradient_accumulation_steps=2,
            zero_stage=3,
            full_finetune_bf16=dtype == torch.bfloat16,
            offload=offload,
        )
        made.append(engine)
        return engine

    yield make_engine
    for engine in made:
        engine.close()


def train(engine, steps):
    seen = []
    for step in steps:
        seen.append(engine.forward_backward(batches_of_step(step, 0, 1, 2))["loss"])
        engine.update(1e-3)
    return seen


def assert_same(one, other):
    ours, theirs = one.full_parameters(), other.full_parameters()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def in_files(folder: Path, parameters="none", optimizer="nvme") -> Offload:
    """Two layers of state at a time, and the last layer alone."""
    return Offload(
        optimizer=optimizer,
        parameters=parameters,
        nvme_path=folder / "swap",
        swapped_elements=2 * WIDTH * WIDTH,
    )


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "parameters", "optimizer"),
    [
        (torch.bfloat16, "none", "nvme"),
        (torch.bfloat16, "cpu", "nvme"),
        (torch.bfloat16, "nvme", "nvme"),
        (torch.bfloat16, "nvme", "cpu"),
        (torch.float32, "nvme", "nvme"),
    ],
)
def test_state_in_files_is_that_in_ram(make, tmp_path, dtype, parameters, optimizer):
    offload = in_files(tmp_path, parameters, optimizer)
    plain, engine = make(dtype, NO_OFFLOAD), make(dtype, offload)
    assert train(engine, range(2)) == train(plain, range(2))
    names = {path.name.split("-")[0] for path in tmp_path.rglob("*/optimizer/rank0/*.swp")}
    assert names >= ({"exp_avg", "exp_avg_sq"} if optimizer == "nvme" else set())
    assert bool(list(tmp_path.rglob("*_param.tensor.swp"))) == (parameters == "nvme")
    assert_same(engine, plain)

    (tmp_path / "one").mkdir()
    engine.save_state(tmp_path / "one")
    straight = train(engine, range(2, 4))
    assert straight == train(plain, range(2, 4))
    used = make(dtype, offload)
    train(used, range(50, 52))  # what is loaded must replace all of this
    used.load_state(tmp_path / "one")
    assert train(used, range(2, 4)) == straight
    assert_same(used, plain)

    (tmp_path / "other").mkdir()
    plain.save_state(tmp_path / "other")
    used.load_state(tmp_path / "other")
    assert_same(used, plain)
    without = make(dtype, NO_OFFLOAD)
    without.load_state(tmp_path / "one")
    assert train(without, range(2, 4)) == straight


@needs_files
@pytest.mark.slow
def test_nothing_is_left_behind(make, tmp_path):
    engine = make(torch.bfloat16, in_files(tmp_path, "nvme"))
    train(engine, range(1))
    assert list((tmp_path / "swap").rglob("*.swp"))
    engine.close()
    assert not (tmp_path / "swap").exists()


def test_weights_of_two_dtypes_do_not_go_into_files(make, tmp_path):
    with pytest.raises(ConfigError, match="bfloat16 and float32"):
        make(torch.float32, in_files(tmp_path, "nvme"), LoraStep(torch.bfloat16))


def test_state_that_cannot_be_cut_does_not_go_into_files(make, tmp_path):
    with pytest.raises(ConfigError, match="one value a weight"):
        make(torch.float32, in_files(tmp_path), factory=RawAdamWFactory())


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert async_io_obstacle(CPU) == "there is no C++ compiler (no-such-compiler)"


def test_a_machine_without_libaio_is_told(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda *arguments: False)
    assert async_io_obstacle(CPU) == "the headers of libaio are missing"
