"""Hooks around blocks, gradient checkpointing, and what is (not) recomputed."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from wan_pairs import build, gradients, make_inputs, run_ours, tiny_config

from trainer.adapters.lora import LoRA
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BlockState, BuildContext
from trainer.models.wan.transformer import WanTransformer

ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
T2V, I2V, TI2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"


class Operators(TorchDispatchMode):
    """Notes every operator that is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Recorder:
    """Notes what it sees under its name and changes nothing."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def before_block(self, index: int, state: BlockState) -> BlockState:
        self.log.append(f"{self.name}>{index}")
        return state

    def after_block(self, index: int, state: BlockState) -> BlockState:
        self.log.append(f"{self.name}<{index}")
        return state


class Shuffle:
    """Runs all blocks on the tokens in another order and puts them back afterwards."""

    def __init__(self, order_L: Tensor, last: int) -> None:
        self.order_L, self.last = order_L, last

    def before_block(self, index: int, state: BlockState) -> BlockState:
        if index:
            return state
        return replace(state, tokens_BLD=state.tokens_BLD[:, self.order_L], kept_L=self.order_L)

    def after_block(self, index: int, state: BlockState) -> BlockState:
        if index != self.last:
            return state
        return replace(state, tokens_BLD=state.tokens_BLD[:, self.order_L.argsort()], kept_L=None)


def with_lora(model: WanTransformer) -> WanTransformer:
    """Freeze `model` and add a LoRA whose both factors are random."""
    variant = VARIANTS[T2V]
    build_context = BuildContext(variant=variant, seed=0, device=torch.device("cpu"), total_steps=1)
    adapter = LoRA(LoRA.Config(rank=4), build_context)
    adapter.inject(model, seed=0)
    random = torch.Generator().manual_seed(0)
    for value in adapter.trainable().values():
        torch.nn.init.normal_(value, std=0.2, generator=random)
    return model


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("variant", [T2V, I2V, TI2V])
def test_checkpointing_changes_no_gradient(
    variant: str, per_token: bool, keep_attention: bool
) -> None:
    config = tiny_config(variant)
    model = build(config)
    inputs = make_inputs(config, per_token=per_token)
    plain = gradients(model, run_ours(model, inputs), inputs.latents)
    model.gradient_checkpointing = True
    model.blocks.keep_attention = keep_attention
    checkpointed = gradients(model, run_ours(model, inputs), inputs.latents)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("keep_attention", [False, True])
def test_checkpointing_changes_no_lora_gradient(keep_attention: bool) -> None:
    config = tiny_config(T2V)
    inputs = make_inputs(config)
    found = []
    for checkpointing in (False, True):
        model = with_lora(build(config))
        model.gradient_checkpointing = checkpointing
        model.blocks.keep_attention = keep_attention
        run_ours(model, inputs).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    for name, gradient in found[0].items():
        assert gradient is not None
        assert torch.equal(gradient, found[1][name]), name


def count_in_backward(model: WanTransformer, operator: str) -> int:
    """Return how often `operator` runs while gradients are computed."""
    output = run_ours(model, make_inputs(tiny_config(T2V), lengths=(5,))).square().mean()
    with Operators() as operators:
        output.backward()
    return operators.names.count(operator)


def test_kept_attention_is_not_recomputed() -> None:
    model = build(tiny_config(T2V))
    assert count_in_backward(model, ATTENTION) == 0
    model.gradient_checkpointing = True
    # Two of the two blocks' four: the last block is not recomputed.
    assert count_in_backward(model, ATTENTION) == 2
    model.blocks.keep_attention = True
    assert count_in_backward(model, ATTENTION) == 0


class LiveBytes(TorchDispatchMode):
    """Follows the memory of all tensors made under it, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_bytes(*, checkpointing: bool, also_last: bool = False) -> int:
    """Return the peak memory of a LoRA step."""
    # Wide enough that blocks outweigh the head, as in every real model.
    config = replace(tiny_config(T2V), num_layers=4, dim=128, ffn_dim=512)
    model = with_lora(build(config))
    model.gradient_checkpointing = checkpointing
    if also_last:
        model.blocks._recomputes = lambda index: True
    inputs = replace(make_inputs(config), latents=torch.randn(2, 16, 3, 16, 16))
    with LiveBytes() as memory:
        run_ours(model, inputs).square().mean().backward()
    return memory.peak


def test_not_recomputing_the_last_block_costs_no_memory_at_the_peak() -> None:
    everything = peak_bytes(checkpointing=True, also_last=True)
    assert peak_bytes(checkpointing=False) > 1.5 * everything
    assert peak_bytes(checkpointing=True) <= 1.01 * everything


def test_the_last_product_of_a_block_is_not_recomputed() -> None:
    model = with_lora(build(tiny_config(T2V)))
    calls: list[int] = []
    for block in model.blocks:
        block.ffn[2].base.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing = True
    output = run_ours(model, make_inputs(tiny_config(T2V))).square().mean()
    assert len(calls) == 2
    output.backward()
    assert len(calls) == 2


def test_nothing_is_kept_when_no_gradient_is_wanted() -> None:
    model = build(tiny_config(T2V))
    model.gradient_checkpointing = True
    with torch.no_grad():
        output = run_ours(model, make_inputs(tiny_config(T2V)))
    assert output.grad_fn is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_nest_and_run_once_a_block(checkpointing: bool) -> None:
    model = build(tiny_config(T2V))
    model.gradient_checkpointing = checkpointing
    log: list[str] = []
    model.blocks.add_hooks([Recorder("a", log), Recorder("b", log)])
    run_ours(model, make_inputs(tiny_config(T2V))).square().mean().backward()
    assert log == ["a>0", "b>0", "b<0", "a<0", "a>1", "b>1", "b<1", "a<1"]


def test_suspended_hooks_stay_silent_and_come_back() -> None:
    model = build(tiny_config(T2V))
    log: list[str] = []
    model.blocks.add_hooks([Recorder("a", log)])

    def fail() -> None:
        with model.blocks.suspended():
            run_ours(model, make_inputs(tiny_config(T2V)))
            assert not log
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    run_ours(model, make_inputs(tiny_config(T2V)))
    assert len(log) == 4


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_carry_their_position_and_time_with_them(
    per_token: bool, checkpointing: bool
) -> None:
    config = tiny_config(TI2V)
    model = build(config)
    model.gradient_checkpointing = checkpointing
    inputs = make_inputs(config, per_token=per_token)
    expected = run_ours(model, inputs)
    order_L = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    model.blocks.add_hooks([Shuffle(order_L, last=1)])
    torch.testing.assert_close(run_ours(model, inputs), expected, atol=1e-5, rtol=0)


def test_fewer_tokens_may_pass_through_the_blocks() -> None:
    config = tiny_config(TI2V)
    model = build(config)
    inputs = make_inputs(config, per_token=True)
    seen: list[tuple[int, ...]] = []

    class Drop(Recorder):
        def before_block(self, index: int, state: BlockState) -> BlockState:
            kept_L = torch.tensor([1, 4, 17])
            return replace(state, tokens_BLD=state.tokens_BLD[:, kept_L], kept_L=kept_L)

        def after_block(self, index: int, state: BlockState) -> BlockState:
            seen.append(tuple(state.tokens_BLD.shape))
            full = state.tokens_BLD.new_zeros(2, 18, config.dim)
            full[:, state.kept_L] = state.tokens_BLD
            return replace(state, tokens_BLD=full, kept_L=None)

    model.blocks.add_hooks([Drop("drop", [])])
    run_ours(model, inputs).square().mean().backward()
    assert seen == [(2, 3, config.dim)] * 2
