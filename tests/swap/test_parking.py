"""Two models that take turns on the device, against the same models that are both there."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.swap.ordered_streams import OrderedStreams, Watch, forget_waits
from tests.swap.swapped_models import CONFIG, assert_equal, loss_of, make_model
from trainer.memory.parking import OneAtATime, Parked
from trainer.memory.streams import HostStreams
from trainer.models.wan.transformer import WanTransformer

BLOCKS = CONFIG.num_layers
TURNS = "aaba"
Models = dict[str, tuple[WanTransformer, dict[str, torch.nn.Parameter]]]


class Counting(HostStreams):
    """Remembers the most device memory that was alive."""

    peak = 0

    def device_bytes(self, num: int) -> torch.Tensor:
        memory = super().device_bytes(num)
        self.peak = max(self.peak, self.held)
        return memory


def make_pair(swap: int = 0, streams: HostStreams | None = None) -> Models:
    """Return two models with different frozen weights."""
    models = {name: make_model(swap, streams=streams) for name in "ab"}
    with torch.no_grad():
        for value in models["b"][0].parameters():
            if not value.requires_grad:
                value.mul_(1.25)
    return models


def park(models: Models, streams: HostStreams) -> OneAtATime:
    stage = OneAtATime(streams)
    for name, (model, _) in models.items():
        stage.add(name, Parked.of(model, model.blocks, model.blocks.swap))
    return stage


def train(models: Models, stage: OneAtATime | None = None) -> list[torch.Tensor]:
    """Train in turns; return all losses, then the trained weights."""
    optimizers = {
        name: torch.optim.AdamW(trainable.values(), lr=1e-2)
        for name, (_, trainable) in models.items()
    }
    seen = []
    for step, name in enumerate(TURNS):
        if stage is not None:
            stage.bring(name)
        optimizers[name].zero_grad()
        loss = loss_of(models[name][0], step)
        loss.backward()
        optimizers[name].step()
        seen.append(loss.detach())
    return [*seen, *(p.detach() for _, trained in models.values() for p in trained.values())]


@pytest.mark.parametrize("swap", [0, 3])
def test_training_in_turns_is_the_same_to_the_bit(swap: int) -> None:
    expected = train(make_pair(swap))
    streams = OrderedStreams()
    models = make_pair(swap, streams)
    stage = park(models, streams)
    with Watch(streams):
        found = train(models, stage)
    assert_equal(found, expected)
    assert streams.faults == []
    assert streams.reads


@pytest.mark.parametrize("missing", ["await_use", "await_copy"])
def test_the_watch_sees_what_is_not_waited_for(missing: str) -> None:
    streams = OrderedStreams()
    models = make_pair(0, streams)
    stage = park(models, streams)
    forget_waits(streams, missing)
    with Watch(streams):
        train(models, stage)
    assert streams.faults


@pytest.mark.parametrize("swap", [0, 3, BLOCKS])
def test_the_device_never_holds_two_of_them(swap: int) -> None:
    streams = Counting()
    models = make_pair(swap, streams)
    stage = park(models, streams)
    assert streams.held == 0, "both wait in RAM"
    train(models, stage)
    (one,) = set(stage.host_bytes.values())
    ring = models["a"][0].blocks.swap.ring_bytes if swap else 0
    assert streams.peak == one + ring


def test_whoever_waits_has_no_weights() -> None:
    streams = HostStreams()
    models = make_pair(0, streams)
    stage = park(models, streams)
    layers = {name: model.blocks[2].self_attn.q.base for name, (model, _) in models.items()}
    heads = {name: model.head.head.bias for name, (model, _) in models.items()}
    assert {heads[name].device.type for name in "ab"} == {"meta"}
    for name, other in ("ab", "ba", "ab"):
        stage.bring(name)
        assert stage.working == name
        assert layers[name].weight.device.type == "cpu"
        assert layers[other].weight.device.type == "meta"
        with pytest.raises((RuntimeError, NotImplementedError)):
            loss_of(models[other][0], 0)


def test_each_change_copies_every_weight_once_and_one_way() -> None:
    streams = HostStreams()
    models = make_pair(0, streams)
    stage = park(models, streams)
    before = {name: flats_of(stage, name) for name in "ab"}
    train(models, stage)
    changes = 1 + sum(one != other for one, other in pairwise(TURNS))
    assert streams.copies == changes * (BLOCKS + 1)
    for name in "ab":
        assert_equal(flats_of(stage, name), before[name])


def flats_of(stage: OneAtATime, name: str) -> list[torch.Tensor]:
    return [flat.host.clone().view(torch.uint8).int() for flat in stage._parked[name].flats]


def test_the_same_model_again_costs_nothing() -> None:
    streams = HostStreams()
    stage = park(make_pair(0, streams), streams)
    stage.bring("a")
    copies = streams.copies
    stage.bring("a")
    assert streams.copies == copies


@pytest.mark.slow
def test_compiled_blocks_take_turns() -> None:
    expected = train(make_pair())
    streams = HostStreams()
    models = make_pair(0, streams)
    stage = park(models, streams)
    for model, _ in models.values():
        for block in list(model.blocks)[:2]:
            block.compile(backend="aot_eager")
    for found, wanted in zip(train(models, stage), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
