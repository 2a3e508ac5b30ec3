"""Blocks that work on parts of the tokens: the loss and the gradients stay what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.wan_pairs import build, make_inputs, run_ours, tiny_config
from tests.swap.ordered_streams import OrderedStreams, Watch
from tests.swap.swapped_models import CONFIG, loss_of, make_model
from trainer.adapters.lora_linear import LoRALinear
from trainer.memory.checkpoint_offload import CheckpointOffload
from trainer.models.wan.transformer import WanTransformer
from trainer.quant.fp8 import Fp8Spec, quantise
from trainer.quant.linear import Fp8Linear

BLOCKS = CONFIG.num_layers
WAYS = {"feed-forward": (5, 1), "attention": (1, 5), "both": (2, 3)}


def chunk(model: WanTransformer, way: str) -> WanTransformer:
    feed_forward, attention = WAYS[way]
    model.set_feed_forward_chunks(feed_forward)
    model.set_attention_chunks(attention)
    return model


def assert_alike(chunked: WanTransformer, plain: WanTransformer, loss: Any = loss_of) -> None:
    losses = []
    for each in (plain, chunked):
        value = loss(each, 0)
        value.backward()
        losses.append(value.detach())
    # Products of other sizes may add up in another order.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in chunked.named_parameters() if p.requires_grad}
    assert wanted
    for name, gradient in wanted.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("swap", [0, 3, BLOCKS])
@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("every", [True, 2, False])
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_the_tokens(way: str, every: Any, keep_attention: bool, swap: int) -> None:
    if keep_attention and not every:
        pytest.skip("everything is kept anyway")
    expected, _ = make_model()
    streams = OrderedStreams()
    model, _ = make_model(swap, streams=streams, checkpointing=every)
    model.blocks.keep_attention = keep_attention
    with Watch(streams):
        assert_alike(chunk(model, way), expected)
    assert streams.faults == []


@pytest.mark.parametrize("way", WAYS)
def test_with_parked_checkpoints(way: str) -> None:
    expected, _ = make_model()
    streams = OrderedStreams()
    model, _ = make_model(BLOCKS, streams=streams)
    model.blocks.offload = CheckpointOffload(streams)
    with Watch(streams):
        assert_alike(chunk(model, way), expected)
    assert streams.faults == []


VARIANTS = ("wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b")


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_full_fine_tune_of_a_batch(way: str, variant: str, per_token: bool) -> None:
    config = tiny_config(variant)
    given = make_inputs(config, per_token=per_token)

    def loss(model: WanTransformer, _: int) -> Tensor:
        return run_ours(model, given).square().mean()

    plain, chunked = build(config), build(config)
    chunked.gradient_checkpointing = True
    assert given.latents.shape[0] > 1
    assert_alike(chunk(chunked, way), plain, loss)


@pytest.mark.parametrize("way", WAYS)
def test_fp8_layers(way: str) -> None:
    spec = Fp8Spec(scaled=True, dtype=torch.float8_e4m3fn)
    models = []
    for _ in range(2):
        model, _ = make_model()
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                weight = quantise(layer.base.weight, spec)
                layer.base = Fp8Linear(weight, layer.base.bias)
        models.append(model)
    assert_alike(chunk(models[1], way), models[0])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_dropout_is_the_same_in_the_recomputation(way: str, checkpointing: bool) -> None:
    """The gradient is that of the loss: a small step changes it by what the gradient says."""
    model, trained = make_model(dtype=torch.float64, checkpointing=checkpointing)
    model.double()
    chunk(model, way).train()
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.dropout = 0.5

    def loss() -> Tensor:
        torch.manual_seed(3)
        return loss_of(model, 0)

    loss().backward()
    names = ("blocks.2.self_attn.k", "blocks.2.cross_attn.q", "blocks.2.ffn.0")
    chosen = [p for name, p in trained.items() if name.startswith(names)]
    assert len(chosen) == 2 * len(names)
    random = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=random, dtype=p.dtype) * 3e-3 for p in chosen]
    slope = sum(float((p.grad * step).sum()) for p, step in zip(chosen, steps, strict=True))
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, step in zip(chosen, steps, strict=True):
                p.add_(step, alpha=sign)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-2)  # the loss is float32


class Widest(TorchDispatchMode):
    """Notes the most rows of some width that one operator makes; weights do not count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        weight = (CONFIG.dim, CONFIG.ffn_dim)  # of the second layer: no activation
        if (
            isinstance(result, Tensor)
            and result.shape[-1:] == (self.width,)
            and result.shape != weight
        ):
            self.rows = max(self.rows, result.numel() // self.width)
        return result


def test_the_whole_width_of_the_feed_forward_never_exists() -> None:
    rows = []
    for chunks in (1, 3):
        model, _ = make_model()
        model.set_feed_forward_chunks(chunks)
        with Widest(CONFIG.ffn_dim) as widest:
            loss_of(model, 0).backward()
        rows.append(widest.rows)
    assert rows == [36, 12]


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_without_gradients(way: str) -> None:
    expected, _ = make_model()
    model, _ = make_model(BLOCKS)
    with torch.no_grad():
        found = loss_of(chunk(model, way), 0)
        torch.testing.assert_close(found, loss_of(expected, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_loss_keeps_its_bits_where_parts_are_not_tiny(way: str, dtype: torch.dtype) -> None:
    wide = {"dim": 128, "ffn_dim": 256, "num_heads": 4, "num_layers": 2}
    config = replace(tiny_config("wan2.1-t2v-1.3b"), **wide)
    model = WanTransformer(config, seed=0).to(dtype)
    model.head.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(2)
    latents = torch.randn((1, config.in_channels, 3, 32, 32), generator=random).to(dtype)
    context = [torch.randn((40, config.text_dim), generator=random)]

    def loss() -> Tensor:
        return model(latents, torch.tensor([500.0]), context).float().square().mean()

    expected = loss().detach()
    assert float(expected) > 0
    chunk(model, way)
    assert torch.equal(loss().detach(), expected)
