"""Engines that take turns, against the same engines that are alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.toy import AdamWFactory, LoraStep, make_batch
from trainer.contract.errors import ModelFileError
from trainer.core.seams import Engine
from trainer.engine.alternating import AlternatingEngine, Turn
from trainer.engine.local import LocalEngine
from trainer.training.checkpoints import CheckpointStore

ORDER = "aabbbaabbb"


def make_engine() -> LocalEngine:
    module = LoraStep()
    return LocalEngine(
        module,
        module.trainable(),
        AdamWFactory(),
        device="cpu",
        max_grad_norm=1.0,
        gradient_accumulation_steps=1,
    )


def turn_of(step: int) -> Turn:
    name = ORDER[(step - 1) % len(ORDER)]
    return Turn(part=name, model=f"model-{name}")


def make_pair(begin: Callable[[str], None] = lambda _name: None) -> AlternatingEngine:
    return AlternatingEngine({"a": make_engine(), "b": make_engine()}, turn_of, begin)


def run(engine: AlternatingEngine, first: int, last: int) -> list[dict[str, float]]:
    found = []
    for step in range(first, last + 1):
        terms = engine.forward_backward([make_batch(step)])
        result = engine.update(1e-2 * step)
        assert result.terms == terms
        found.append(terms)
    return found


def test_it_is_an_engine() -> None:
    engine = make_pair()
    assert isinstance(engine, Engine)
    assert (engine.rank, engine.world_size, engine.device.type) == (0, 1, "cpu")
    assert engine.any_rank(True)
    assert not engine.any_rank(False)
    engine.barrier()
    engine.close()


def test_each_part_is_trained_as_alone_and_the_idle_one_stays() -> None:
    engine = make_pair()
    before = engine.full_parameters()
    run(engine, 1, 2)
    after = engine.full_parameters()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("a.")}
    terms = run(engine, 3, 10)
    for part in "ab":
        alone = make_engine()
        steps = [step for step in range(1, 11) if ORDER[step - 1] == part]
        for step in steps:
            seen = alone.forward_backward([make_batch(step)])
            alone.update(1e-2 * step)
            if step > 2:
                labelled = {f"model-{part}.{name}": value for name, value in seen.items()}
                assert terms[step - 3] == labelled
        for name, value in alone.full_parameters().items():
            assert torch.equal(engine.full_parameters()[f"{part}.{name}"], value)


def test_who_works_is_made_ready_before_each_step() -> None:
    ready: list[str] = []
    run(make_pair(ready.append), 1, 4)
    assert ready == ["model-a", "model-a", "model-b", "model-b"]


@pytest.mark.parametrize("at", [1, 4, 5, 7])
def test_a_checkpoint_goes_on_in_the_middle_of_a_turn(tmp_path: Path, at: int) -> None:
    whole = make_pair()
    run(whole, 1, 10)
    first = make_pair()
    run(first, 1, at)
    store = CheckpointStore(tmp_path, keep_last=1)
    saved = store.save(at, lambda _folder: None, {}, first)
    assert (saved.engine, saved.world_size, saved.zero_stage) == ("local", 1, 0)
    second = make_pair()
    second.load_state(store.load(saved.path).path)
    run(second, at + 1, 10)
    assert_same(second.full_parameters(), whole.full_parameters())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_damaged_part_breaks_the_checkpoint(tmp_path: Path) -> None:
    engine = make_pair()
    run(engine, 1, 3)
    store = CheckpointStore(tmp_path, keep_last=1)
    saved = store.save(3, lambda _folder: None, {}, engine)
    file = saved.path / "b" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"b/rank-00000\.safetensors is not what was written"):
        store.load(saved.path)


def test_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    alone = make_engine()
    alone.save_state(tmp_path)
    with pytest.raises(ModelFileError, match="one set of trained parameters"):
        make_pair().load_state(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    AlternatingEngine({"c": make_engine()}, turn_of, lambda _name: None).save_state(other)
    with pytest.raises(ModelFileError, match="holds c, and this run trains a and b"):
        make_pair().load_state(other)
    assert json.loads((other / "engine.json").read_text())["step"] == 0
