"""Ways to keep, park and recompute activations: the loss and the gradients stay what they are."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.swap.ordered_streams import OrderedStreams, Watch
from tests.swap.swapped_models import CONFIG, assert_equal, loss_of, make_model, train
from trainer.memory.checkpoint_offload import CheckpointOffload
from trainer.memory.streams import HostStreams

BLOCKS = CONFIG.num_layers


@pytest.mark.parametrize("every", [2, 3, 100])
@pytest.mark.parametrize("swap", [0, BLOCKS])
def test_every_kth_block_is_recomputed(every: int, swap: int) -> None:
    expected = train(*make_model())
    model, trainable = make_model(swap, checkpointing=every)
    assert_equal(train(model, trainable), expected)
    calls = [0] * BLOCKS
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: _count(calls, index))
    loss_of(model, 0).backward()
    recomputed = [index % every == 0 and index < BLOCKS - 1 for index in range(BLOCKS)]
    assert calls == [1 + again for again in recomputed]


def _count(calls: list[int], index: int) -> None:
    calls[index] += 1


@pytest.mark.parametrize("swap", [0, BLOCKS])
@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("every", [True, 2])
def test_parked_checkpoints_change_nothing(swap: int, keep_attention: bool, every: Any) -> None:
    expected = train(*make_model())
    streams = OrderedStreams()
    model, trainable = make_model(swap, streams=streams, checkpointing=every)
    model.blocks.keep_attention = keep_attention
    model.blocks.offload = CheckpointOffload(streams)
    with Watch(streams):
        found = train(model, trainable)
    assert_equal(found, expected)
    assert streams.faults == []
    assert streams.copies


def test_each_checkpoint_leaves_and_returns_once() -> None:
    streams = HostStreams()
    model, _ = make_model()
    model.blocks.offload = CheckpointOffload(streams)
    for step in range(3):
        before = streams.copies
        loss_of(model, step).backward()
        # All but the last block are checkpointed; the last of them is still here at the turn.
        assert streams.copies - before == 2 * (BLOCKS - 1) - 1
    gc.collect()
    assert streams.held == 0


def test_host_memory_is_used_again() -> None:
    class Counting(HostStreams):
        made = 0

        def host_bytes(self, num: int) -> torch.Tensor:
            self.made += 1
            return super().host_bytes(num)

    streams = Counting()
    model, _ = make_model()
    model.blocks.offload = CheckpointOffload(streams)
    for step in range(4):
        loss_of(model, step).backward()
    loss_of(model, 9)  # without a backward
    loss_of(model, 9).backward()
    assert streams.made == BLOCKS - 1


def test_a_graph_may_be_walked_twice() -> None:
    model, trainable = make_model()
    model.blocks.offload = CheckpointOffload(HostStreams())
    loss = loss_of(model, 0)
    first = torch.autograd.grad(loss, list(trainable.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(trainable.values()))
    assert_equal(list(again), list(first))


@pytest.mark.slow
def test_compiled_blocks_with_swapped_weights() -> None:
    expected, _ = make_model()
    model, _ = make_model(BLOCKS)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    losses = []
    for each in (expected, model):
        loss = loss_of(each, 0)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    wanted = {name: p.grad for name, p in expected.named_parameters() if p.requires_grad}
    found = {
        name.replace("._orig_mod", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
