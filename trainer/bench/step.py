"""Time of one LoRA training step against diffusers + PEFT, both in this process.

Same weights, same LoRA, same batch; the gradients of both are compared, too. Processor time of one
thread: the same as the clock's on an idle machine, and still meaningful on a busy one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.lora import LoRA
from trainer.bench.result import Measurement, timed_in_turns
from trainer.contract.diffusers_names import to_diffusers_name
from trainer.contract.variants import TransformerConfig, get_variant
from trainer.core.seams import BuildContext
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.transformer import WanTransformer

LIMIT = 0.75
RANK = 16
CONFIG = TransformerConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=4)
GRID = (6, 32, 32)
"""Latent frames, height and width: 1536 tokens."""
_FACTORS = {"down": "lora_A", "up": "lora_B"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch of one sample."""

    latents_BCFHW: Tensor
    timestep_B: Tensor
    context_BTD: Tensor
    target_BCFHW: Tensor


def measure(*, pairs: int = 7, text_tokens: int = 80, keep_attention: bool = False) -> Measurement:
    """Return the median over pairs of (Menma / diffusers + PEFT).

    Args:
        pairs: steps of each side.
        text_tokens: rows of the caption; the rest up to 512 is zero.
        keep_attention: keep attention outputs instead of recomputing them in the backward.

    Raises:
        ImportError: diffusers or PEFT is not installed.
    """
    torch.set_num_threads(1)
    inputs = make_inputs(text_tokens)
    ours = make_menma(keep_attention=keep_attention)
    theirs = make_reference(ours)
    step_ours = _step(ours, inputs, ours)
    step_theirs = _step(theirs, inputs, lambda *given: theirs(*given, return_dict=False)[0])
    step_ours()
    step_theirs()
    difference = gradient_difference(ours, theirs)
    times = timed_in_turns(step_ours, step_theirs, pairs)
    return Measurement(
        name="step",
        what="LoRA training step / diffusers + PEFT",
        value=statistics.median(a[0] / b[0] for a, b in times),
        unit="ratio",
        limit=LIMIT,
        figures={
            "menma_s": round(statistics.median(a[0] for a, _ in times), 4),
            "reference_s": round(statistics.median(b[0] for _, b in times), 4),
            "tokens": GRID[0] * GRID[1] * GRID[2] // 4,
            "text_tokens": text_tokens,
            "keep_attention": keep_attention,
            "gradient_difference": difference,
        },
    )


def make_inputs(text_tokens: int) -> Inputs:
    """Return a batch whose text has `text_tokens` rows and zeros up to 512."""
    random = torch.Generator().manual_seed(7)
    latents, target = torch.randn((2, 1, CONFIG.in_channels, *GRID), generator=random)
    context = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    context[:, :text_tokens] = torch.randn((1, text_tokens, CONFIG.text_dim), generator=random)
    return Inputs(latents, torch.tensor([640.0]), context, target)


def make_menma(*, keep_attention: bool) -> WanTransformer:
    """Return the model with LoRA on every block linear, checkpointing on."""
    model = WanTransformer(CONFIG)
    init_fan_in(model, 3)
    build = BuildContext(
        variant=get_variant("wan2.1-t2v-1.3b"), seed=0, device=torch.device("cpu"), total_steps=1
    )
    adapter = LoRA(LoRA.Config.model_validate({"rank": RANK}), build)
    adapter.inject(model, seed=0)
    for name, value in adapter.trainable().items():
        if name.endswith(".up"):
            torch.nn.init.normal_(value, std=0.02)
    model.gradient_checkpointing = True
    model.blocks.keep_attention = keep_attention
    return model.train()


def make_reference(ours: WanTransformer) -> Any:
    """Return diffusers' model with PEFT's LoRA, weights taken from `ours`."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    )
    state = ours.state_dict()
    factors = {name: state.pop(name) for name in list(state) if name.endswith((".up", ".down"))}
    model.load_state_dict({to_diffusers_name(name): value for name, value in state.items()})
    modules = [to_diffusers_name(n.removesuffix(".up")) for n in factors if n.endswith(".up")]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))
    for name, value in factors.items():
        _counterpart(model, name).data.copy_(value)
    model.enable_gradient_checkpointing()
    return model.train()


def gradient_difference(ours: WanTransformer, theirs: Any) -> float:
    """Return the largest difference between the LoRA gradients, relative to the largest entry."""
    worst = 0.0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            other = _counterpart(theirs, name).grad
            difference = (parameter.grad - other).abs().max() / other.abs().max()
            worst = max(worst, float(difference))
    return worst


def _counterpart(theirs: Any, name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    return theirs.get_parameter(f"{to_diffusers_name(module)}.{_FACTORS[leaf]}.default.weight")


def _step(
    model: torch.nn.Module, inputs: Inputs, predict: Callable[..., Tensor]
) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        velocity = predict(inputs.latents_BCFHW, inputs.timestep_B, inputs.context_BTD)
        (velocity - inputs.target_BCFHW).square().mean().backward()  # type: ignore[no-untyped-call]

    return step
