"""Tiny Wan transformers with a LoRA whose blocks are streamed, and steps over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.models.wan_pairs import Inputs, build, make_inputs, run_ours, tiny_config
from trainer.adapters.lora import LoRA
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import HostStreams, Streams
from trainer.models.wan.transformer import WanTransformer

T2V = "wan2.1-t2v-1.3b"
CONFIG = replace(tiny_config(T2V), num_layers=6)


def inputs(seed: int = 0) -> Inputs:
    """Return inputs that differ from step to step; the latents ask for no gradient."""
    given = make_inputs(CONFIG)
    noise = torch.randn(given.latents.shape, generator=torch.Generator().manual_seed(seed))
    return replace(given, latents=noise)


def make_model(
    swap: int = 0,
    *,
    ring: int = 2,
    streams: Streams | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: Any = True,
) -> tuple[WanTransformer, dict[str, torch.nn.Parameter]]:
    """Return a model and what of it is trained, a LoRA with random factors."""
    model = build(CONFIG).to(dtype)
    model.requires_grad_(False)
    model.time_embedding.float()
    if swap:
        model.blocks.swap = BlockSwap(model.blocks, swap, streams or HostStreams(), ring=ring)
    context = BuildContext(variant=VARIANTS[T2V], seed=0, device=torch.device("cpu"), total_steps=1)
    adapter = LoRA(LoRA.Config(rank=4), context)
    adapter.inject(model, seed=0)
    random = torch.Generator().manual_seed(0)
    for value in adapter.trainable().values():
        torch.nn.init.normal_(value, std=0.2, generator=random)
    model.gradient_checkpointing = checkpointing
    return model, adapter.trainable()


def loss_of(model: WanTransformer, seed: int) -> Tensor:
    """Return a loss of one forward."""
    return run_ours(model, inputs(seed)).float().square().mean()


def train(
    model: WanTransformer, trainable: dict[str, torch.nn.Parameter], steps: int = 3
) -> list[Tensor]:
    """Train; return the losses, then the last gradients, then the trained weights."""
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    seen: list[Tensor] = []
    gradients: list[Tensor] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        seen.append(loss.detach())
        gradients = [p.grad.clone() for p in trainable.values() if p.grad is not None]
        assert len(gradients) == len(trainable)
        optimizer.step()
    return [*seen, *gradients, *(p.detach().clone() for p in trainable.values())]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert bool(a.isfinite().all()), index
        assert torch.equal(a, b), index
