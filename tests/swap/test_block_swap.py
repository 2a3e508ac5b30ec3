"""Block swap against the same model with all blocks on the device: bits, copies, residents."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models.wan_pairs import run_ours
from tests.swap.ordered_streams import OrderedStreams, Watch, forget_waits
from tests.swap.swapped_models import CONFIG, assert_equal, inputs, loss_of, make_model, train
from trainer.memory.block_swap import BlockSwap, spread
from trainer.memory.flat_block import FlatBlock
from trainer.memory.streams import HostStreams

BLOCKS = CONFIG.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("swap", "ring"), [(1, 2), (3, 2), (BLOCKS, 2), (BLOCKS, 3), (5, 4)])
def test_training_is_the_same_to_the_bit(swap: int, ring: int, dtype: torch.dtype) -> None:
    expected = train(*make_model(dtype=dtype))
    assert_equal(train(*make_model(swap, ring=ring, dtype=dtype)), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keep_attention", [False, True])
def test_any_way_to_keep_activations_gives_the_same(
    checkpointing: bool, keep_attention: bool
) -> None:
    found = []
    for swap in (0, 4):
        model, trainable = make_model(swap, checkpointing=checkpointing)
        model.blocks.keep_attention = keep_attention
        found.append(train(model, trainable))
    assert_equal(*found)


@pytest.mark.parametrize(("swap", "ring"), [(BLOCKS, 2), (BLOCKS, 3), (4, 2), (4, 3), (2, 2)])
def test_blocks_around_the_turn_are_copied_once(swap: int, ring: int) -> None:
    streams = HostStreams()
    model, _ = make_model(swap, ring=ring, streams=streams)
    copies = []
    for step in range(3):
        before = streams.copies
        loss_of(model, step).backward()
        copies.append(streams.copies - before)
    # Up and down through the blocks; those in the ring at either turn stay.
    assert copies == [2 * (swap - ring) + ring, 2 * (swap - ring), 2 * (swap - ring)]


def test_no_more_than_the_ring_is_on_the_device() -> None:
    streams = HostStreams()
    model, _ = make_model(BLOCKS, ring=2, streams=streams)
    swap = model.blocks.swap
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(len(swap.resident)))
    loss_of(model, 0).backward()
    assert len(seen) == 2 * BLOCKS - 1  # the last block is not recomputed
    assert max(seen) == 2
    assert streams.held == swap.ring_bytes
    assert swap.host_bytes == BLOCKS // 2 * swap.ring_bytes


def test_nothing_is_copied_back() -> None:
    class OneWay(HostStreams):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            assert target.untyped_storage()._cdata in self.on_device
            assert source.untyped_storage()._cdata not in self.on_device
            super().copy(target, source)

        def device_bytes(self, num: int) -> torch.Tensor:
            memory = super().device_bytes(num)
            self.on_device.add(memory.untyped_storage()._cdata)
            return memory

        def __init__(self) -> None:
            super().__init__()
            self.on_device: set[int] = set()

    streams = OneWay()
    model, trainable = make_model(BLOCKS, streams=streams)
    masters = [flat.host.clone() for flat in model.blocks.swap._flats]
    train(model, trainable)
    assert streams.copies
    for flat, master in zip(model.blocks.swap._flats, masters, strict=True):
        assert torch.equal(flat.host, master)


@pytest.mark.parametrize(("swap", "ring"), [(BLOCKS, 2), (BLOCKS, 3), (4, 2), (2, 2), (1, 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_crossing_of_the_queues_is_waited_for(
    swap: int, ring: int, checkpointing: bool
) -> None:
    streams = OrderedStreams()
    model, trainable = make_model(swap, ring=ring, streams=streams, checkpointing=checkpointing)
    with Watch(streams):
        train(model, trainable, steps=2)
        with torch.no_grad():
            run_ours(model, inputs())
        model.blocks.swap.release()
        train(model, trainable, steps=1)
    assert streams.faults == []
    assert streams.reads > 100 * swap


@pytest.mark.parametrize("forgotten", ["await_copy", "await_use"])
def test_the_watch_notices_what_is_not_waited_for(forgotten: str) -> None:
    streams = OrderedStreams()
    forget_waits(streams, forgotten)
    model, trainable = make_model(BLOCKS, streams=streams)
    with Watch(streams):
        train(model, trainable, steps=1)
    assert streams.faults


def test_an_absent_block_cannot_be_used() -> None:
    model, _ = make_model(BLOCKS)
    loss_of(model, 0).backward()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model.blocks[4].ffn(torch.zeros(1, CONFIG.dim))


def test_sampling_keeps_the_order_and_copies_each_block_once_a_forward() -> None:
    expected, _ = make_model()
    streams = HostStreams()
    model, _ = make_model(BLOCKS, streams=streams)
    for seed in range(3):
        before = streams.copies
        with torch.no_grad():
            assert torch.equal(run_ours(model, inputs(seed)), run_ours(expected, inputs(seed)))
        assert streams.copies - before == (BLOCKS + 1 if seed == 0 else BLOCKS)


def test_a_second_forward_before_the_backward() -> None:
    found = []
    for swap in (0, BLOCKS):
        model, trainable = make_model(swap)
        loss = loss_of(model, 0)
        with torch.no_grad():
            frozen = loss_of(model, 1)
        (loss + loss_of(model, 2) + frozen).backward()
        found.append([loss.detach(), *(p.grad for p in trainable.values())])
    assert_equal(*found)


def test_validation_between_steps_changes_nothing() -> None:
    expected = train(*make_model(), steps=2)
    model, trainable = make_model(BLOCKS)
    with torch.inference_mode():  # memory made here must be usable in a step
        run_ours(model, inputs(7))
    assert_equal(train(model, trainable, steps=2), expected)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_next_step_is_right(where: str) -> None:
    expected = train(*make_model())
    streams = OrderedStreams()
    model, trainable = make_model(BLOCKS, streams=streams)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with Watch(streams):
        loss = loss_of(model, 5) if where == "backward" else None
        handle = model.blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            (loss_of(model, 5) if loss is None else loss).backward()
        handle.remove()
        for parameter in trainable.values():
            parameter.grad = None
        assert_equal(train(model, trainable), expected)
    assert streams.faults == []


def test_moving_the_model_away_frees_the_ring() -> None:
    streams = HostStreams()
    streams.device = torch.device("meta")  # any but the one it is moved to
    model, _ = make_model(BLOCKS, streams=streams)
    before = loss_of(model, 0)
    assert streams.held
    model.to("cpu")
    gc.collect()
    del before
    assert streams.held == 0
    assert model.blocks.swap.resident == ()


def test_frozen_weights_are_no_parameters_any_more() -> None:
    model, trainable = make_model(BLOCKS)
    inside = {name for name, _ in model.blocks.named_parameters()}
    assert inside == {name.removeprefix("blocks.") for name in trainable}
    assert not list(model.blocks.buffers())


@given(total=st.integers(1, 60), data=st.data())
def test_streamed_blocks_are_spread(total: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, total))
    chosen = spread(num, total)
    assert len(set(chosen)) == num
    assert list(chosen) == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < total
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 7), ring=st.integers(2, 4), data=st.data())
def test_any_order_of_needs_finds_the_right_weights(
    num: int, ring: int, data: st.DataObject
) -> None:
    blocks = nn.ModuleList(nn.Linear(2, 2).requires_grad_(False) for _ in range(7))
    weights = [block.weight.clone() for block in blocks]
    swap = BlockSwap(blocks, num, OrderedStreams(), ring=ring)
    for index in data.draw(st.lists(st.integers(0, 6), max_size=30)):
        if data.draw(st.booleans()):
            with swap.forward(returns=data.draw(st.booleans())):
                swap.need(index)
        else:
            swap.need(index)
        assert torch.equal(blocks[index].weight, weights[index])
        assert len(swap.resident) <= ring
        absent = [i for i in swap.streamed if i != index]
        assert all(blocks[i].weight.is_meta for i in absent)


def test_a_block_of_many_formats_survives() -> None:
    block = nn.Module()
    kept: dict[str, torch.Tensor] = {}
    for number, dtype in enumerate(
        (torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.uint8, torch.float64)
    ):
        value = torch.randn(3, number + 1).to(dtype)
        kept[f"p{number}"] = value.clone()
        if number % 2:
            block.register_buffer(f"p{number}", value)
        else:
            block.register_parameter(f"p{number}", nn.Parameter(value, requires_grad=False))
    block.trained = nn.Parameter(torch.ones(2))
    block.register_buffer("empty", None)
    streams = HostStreams()
    flat = FlatBlock(block)
    flat.take(streams.host_bytes(flat.num_bytes))
    device = streams.device_bytes(flat.num_bytes)
    device.copy_(flat.host)
    flat.enter(flat.views(device))
    for name, value in kept.items():
        found = getattr(block, name)
        assert found.dtype == value.dtype
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8)), name
        assert found.data_ptr() % value.element_size() == 0
    assert isinstance(block.trained, nn.Parameter)


def test_impossible_rings_are_refused() -> None:
    blocks = nn.ModuleList(nn.Linear(2, 2).requires_grad_(False) for _ in range(3))
    for num, ring in ((0, 2), (4, 2), (2, 1)):
        with pytest.raises(ValueError, match="blocks through"):
            BlockSwap(blocks, num, HostStreams(), ring=ring)
