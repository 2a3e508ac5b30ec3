"""Time of one LoRA training step against diffusers + PEFT, both in this process.

    python -m tests.bench.bench_step [--pairs N] [--text-tokens T] [--keep-attention]

One JSON line: the median over pairs of (Menma / reference), measured in turns so that load on the
machine hits both alike. Same weights, same LoRA, same batch; the gradients are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from trainer.adapters.lora import LoRA
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.core.seams import BuildContext
from trainer.io.formats.diffusers_names import to_diffusers_name
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.transformer import WanTransformer

RANK = 16
CONFIG = TransformerConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=4)
GRID = (6, 32, 32)
"""Latent frames, height and width: 1536 tokens."""


@dataclass(frozen=True)
class Inputs:
    """One batch of one sample."""

    latents: Tensor
    timestep: Tensor
    context: Tensor
    target: Tensor


def make_inputs(text_tokens: int) -> Inputs:
    """Return a batch whose text has `text_tokens` rows and zeros up to 512."""
    random = torch.Generator().manual_seed(7)
    latents, target = torch.randn((2, 1, CONFIG.in_channels, *GRID), generator=random)
    context = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    context[:, :text_tokens] = torch.randn((1, text_tokens, CONFIG.text_dim), generator=random)
    return Inputs(latents, torch.tensor([640.0]), context, target)


def make_menma(keep_attention: bool) -> WanTransformer:
    """Return the model with LoRA on every block linear, checkpointing on."""
    model = WanTransformer(CONFIG)
    init_fan_in(model, 3)
    build = BuildContext(
        variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=1
    )
    adapter = LoRA(LoRA.Config(rank=RANK), build)
    adapter.inject(model, seed=0)
    for name, value in adapter.trainable().items():
        if name.endswith(".up"):
            torch.nn.init.normal_(value, std=0.02)
    model.gradient_checkpointing = True
    model.blocks.keep_attention = keep_attention
    return model.train()


def make_reference(ours: WanTransformer) -> WanTransformer3DModel:
    """Return diffusers' model with PEFT's LoRA, weights taken from `ours`."""
    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    )
    state = ours.state_dict()
    factors = {name: state.pop(name) for name in list(state) if name.endswith((".up", ".down"))}
    model.load_state_dict({to_diffusers_name(name): value for name, value in state.items()})
    modules = [to_diffusers_name(name.removesuffix(".up")) for name in factors if "up" in name[-3:]]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))
    for name, value in factors.items():
        module, _, leaf = name.rpartition(".")
        suffix = {"down": "lora_A", "up": "lora_B"}[leaf]
        model.get_parameter(f"{to_diffusers_name(module)}.{suffix}.default.weight").data.copy_(
            value
        )
    model.enable_gradient_checkpointing()
    return model.train()


def compare_gradients(ours: WanTransformer, theirs: WanTransformer3DModel) -> float:
    """Return the largest difference between the LoRA gradients, relative to the largest entry."""
    worst = 0.0
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            continue
        module, _, leaf = name.rpartition(".")
        suffix = {"down": "lora_A", "up": "lora_B"}[leaf]
        other = theirs.get_parameter(f"{to_diffusers_name(module)}.{suffix}.default.weight").grad
        assert other is not None, name
        worst = max(worst, float((parameter.grad - other).abs().max() / other.abs().max()))
    return worst


def timed(step: Callable[[], None]) -> float:
    """Return the processor seconds that `step` takes: one thread, so the same as wall time on an
    idle machine, and still meaningful on a busy one."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--text-tokens", type=int, default=80)
    parser.add_argument("--keep-attention", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(arguments.text_tokens)
    ours = make_menma(arguments.keep_attention)
    theirs = make_reference(ours)

    def step_ours() -> None:
        ours.zero_grad()
        velocity = ours(inputs.latents, inputs.timestep, inputs.context)
        (velocity - inputs.target).square().mean().backward()

    def step_theirs() -> None:
        theirs.zero_grad()
        velocity = theirs(inputs.latents, inputs.timestep, inputs.context, return_dict=False)[0]
        (velocity - inputs.target).square().mean().backward()

    step_ours()
    step_theirs()
    difference = compare_gradients(ours, theirs)
    pairs = [(timed(step_ours), timed(step_theirs)) for _ in range(arguments.pairs)]
    print(
        json.dumps(
            {
                "metric": "lora_step_time_vs_diffusers_peft",
                "ratio": round(statistics.median(a / b for a, b in pairs), 4),
                "limit": 0.9,
                "menma_s": round(statistics.median(a for a, _ in pairs), 4),
                "reference_s": round(statistics.median(b for _, b in pairs), 4),
                "tokens": GRID[0] * GRID[1] * GRID[2] // 4,
                "text_tokens": arguments.text_tokens,
                "keep_attention": arguments.keep_attention,
                "gradient_difference": difference,
            }
        )
    )


if __name__ == "__main__":
    main()
