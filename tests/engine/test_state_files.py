"""Engine state on disk: any cut can be read back by any other, and nothing damaged is taken."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.toy import AdamWFactory, FullStep, LoraStep, RawAdamWFactory, make_batch
from trainer.contract.errors import DiskError, ModelFileError
from trainer.engine import state_files
from trainer.engine.local import LocalEngine
from trainer.engine.state_files import EngineState, Piece, await_parts, read_layout
from trainer.io.mapped_load import open_weights

SHAPES = {"b": (5,), "a.weight": (3, 4), "s": ()}
TOTAL = 18


def cut_state(cuts: list[int], fill: bool, rank: int) -> EngineState:
    """Return rank `rank`'s share of a state that is cut at `cuts` of all elements in a row."""
    bounds = [0, *sorted(cuts), TOTAL]
    low, high = bounds[rank], bounds[rank + 1]
    everything = torch.arange(TOTAL, dtype=torch.float32)
    flat = torch.nn.Parameter(everything[low:high].clone() if fill else torch.zeros(high - low))
    optimizer = torch.optim.AdamW([flat], lr=0.1)
    if fill:
        optimizer.state[flat] = {
            "step": torch.tensor(7.0),
            "exp_avg": flat.detach() + 100,
            "exp_avg_sq": flat.detach() + 200,
        }
    pieces, offset = [], 0
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        start, end = max(low, offset), min(high, offset + numel)
        if start < end:
            pieces.append(Piece(name, start - offset, end - start, 0, start - low))
        offset += numel
    return EngineState(
        engine="deepspeed",
        world_size=len(cuts) + 1,
        zero_stage=2,
        rank=rank,
        shapes=SHAPES,
        flats=[flat],
        pieces=pieces,
        own=True,
        optimizer=optimizer,
        state_names=("exp_avg", "exp_avg_sq"),
        inner_step=optimizer.step,
    )


CUTS = st.lists(st.integers(0, TOTAL), max_size=4)


@settings(max_examples=60, deadline=None)
@given(written=CUTS, read=CUTS)
def test_any_cut_is_read_by_any_other(tmp_path_factory, written, read):
    folder = tmp_path_factory.mktemp("state")
    for rank in range(len(written) + 1):
        state_files.save(cut_state(written, fill=True, rank=rank), folder)
    for rank in range(len(read) + 1):
        expected, state = (cut_state(read, fill=fill, rank=rank) for fill in (True, False))
        state_files.load(state, folder)
        assert torch.equal(state.flats[0], expected.flats[0])
        if state.flats[0].numel():
            held = state.optimizer.state[state.flats[0]]
            wanted = expected.optimizer.state[expected.flats[0]]
            assert {k: v.tolist() for k, v in held.items()} == {
                k: v.tolist() for k, v in wanted.items()
            }
        assert state.flats[0].grad is None
        assert state.optimizer.param_groups[0]["lr"] == 0.1


def make_engine(module=None, factory=None, steps=2):
    module = module or LoraStep()
    engine = LocalEngine(
        module,
        module.trainable(),
        factory or AdamWFactory(),
        device="cpu",
        max_grad_norm=0,
        gradient_accumulation_steps=1,
    )
    for number in range(1, 1 + steps):
        engine.forward_backward([make_batch(number)])
        engine.update(1e-2)
    return engine


@pytest.fixture
def folder(tmp_path) -> Path:
    make_engine().save_state(tmp_path)
    return tmp_path


def test_what_is_on_disk(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "engine.json",
        "rank-00000.safetensors",
    ]
    assert read_layout(folder) == {"engine": "local", "world_size": 1, "zero_stage": 0}
    weights = open_weights(folder / "rank-00000.safetensors")
    assert {name.split("|")[0] for name in weights} == {"weight", "exp_avg", "exp_avg_sq"}
    assert {str(info.dtype) for info in weights.values()} == {"torch.float32"}
    numbers = json.loads(weights.metadata["numbers"])
    assert set(numbers) == set(LoraStep().trainable())
    assert all(value == {"step": 2.0} for value in numbers.values())


def refused(engine, folder: Path, words: str) -> None:
    before = engine.full_parameters()
    with pytest.raises(ModelFileError, match=words) as caught:
        engine.load_state(folder)
    assert caught.value.hint
    assert all(torch.equal(before[n], p) for n, p in engine.full_parameters().items())


def test_other_parameters_are_refused(folder):
    refused(make_engine(LoraStep(blocks=3), steps=0), folder, "blocks.2.first.down is not in it")
    refused(make_engine(LoraStep(blocks=1), steps=0), folder, "blocks.1.first.down is not trained")
    refused(make_engine(FullStep(), steps=0), folder, "other trained parameters")


def test_another_optimizer_is_refused(folder):
    refused(make_engine(factory=RawAdamWFactory(), steps=0), folder, "state of AdamW")


def test_raw_state_of_other_settings_is_refused(tmp_path):
    make_engine(factory=RawAdamWFactory()).save_state(tmp_path)

    class Amsgrad(RawAdamWFactory):
        def build(self, parameters, lr):
            return torch.optim.AdamW([dict(g) for g in parameters], lr=lr, amsgrad=True)

    refused(make_engine(factory=Amsgrad(), steps=0), tmp_path, r"max_exp_avg_sq is missing")


def test_damage_is_refused(folder):
    path = folder / "rank-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refused(make_engine(steps=0), folder, "truncated")
    path.unlink()
    refused(make_engine(steps=0), folder, "lacks a part of weight")
    path.write_bytes(whole)
    info = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(info | {"format": 99}))
    refused(make_engine(steps=0), folder, "format 99")
    (folder / "engine.json").write_text("{")
    refused_without_hint = make_engine(steps=0)
    with pytest.raises(ModelFileError, match="not valid JSON"):
        refused_without_hint.load_state(folder)
    (folder / "engine.json").unlink()
    refused(make_engine(steps=0), folder, "is missing")


def test_the_parts_of_all_ranks_are_waited_for(tmp_path):
    layout = {"engine": "deepspeed", "world_size": 2, "zero_stage": 1}
    (tmp_path / "engine.json").write_text(json.dumps(layout))
    (tmp_path / "rank-00000.safetensors").touch()
    with pytest.raises(DiskError, match=r"rank-00001\.safetensors was written and is not"):
        await_parts(tmp_path, within_s=0)
    late = threading.Timer(0.3, (tmp_path / "rank-00001.safetensors").touch)
    late.start()
    await_parts(tmp_path, within_s=30)
    # Replicas are written once.
    (tmp_path / "engine.json").write_text(json.dumps(layout | {"zero_stage": 0}))
    (tmp_path / "rank-00001.safetensors").unlink()
    await_parts(tmp_path, within_s=0)
