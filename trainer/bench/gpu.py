"""LoRA training step of the released shapes on a GPU: seconds and peak memory, random weights.

bf16 weights, rank 32 on every block linear, gradient checkpointing, one sample, AdamW. The 14B
shapes run with all blocks on the device, and with all of them streamed (block swap). The figures
have no limit; `docs/benchmarks.md` records them with the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.lora import LoRA
from trainer.bench.result import Measurement
from trainer.contract.errors import RunError
from trainer.contract.variants import Variant, get_variant
from trainer.core.seams import BuildContext
from trainer.memory.block_swap import BlockSwap
from trainer.memory.streams import streams_of
from trainer.models.wan.transformer import FLOAT32_MODULES, WanTransformer
from trainer.optimizers.adamw import AdamW

RANK = 32
TEXT_TOKENS = 80


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and a clip."""

    variant: str
    width: int
    height: int
    num_frames: int
    swap_all: bool = False
    """Every block is streamed from RAM."""

    def __str__(self) -> str:
        swapped = " all blocks swapped" if self.swap_all else ""
        return f"{self.variant} {self.width}x{self.height}x{self.num_frames}{swapped}"


SHAPES = tuple(
    Shape(variant, width, 480, 81, swap_all)
    for variant, width, swap_all in (
        ("wan2.1-t2v-1.3b", 480, False),
        ("wan2.1-t2v-1.3b", 832, False),
        ("wan2.1-t2v-14b", 480, False),
        ("wan2.1-t2v-14b", 480, True),
        ("wan2.1-t2v-14b", 832, False),
        ("wan2.1-t2v-14b", 832, True),
    )
)


def measure(
    *, shapes: Sequence[Shape] = SHAPES, device: str = "cuda", repeats: int = 3
) -> Measurement:
    """Return the median step time of the first shape; `figures` holds all shapes.

    Raises:
        RunError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("this benchmark needs a CUDA GPU, and torch sees none")
    rows = {str(shape): _measure_shape(shape, torch.device(device), repeats) for shape in shapes}
    first = rows[str(shapes[0])]
    return Measurement(
        name="gpu",
        what=f"LoRA step, {shapes[0]}",
        value=first["step_s"],
        unit="s",
        limit=None,
        figures={"device": _device_name(torch.device(device)), "rank": RANK, "shapes": rows},
    )


def _measure_shape(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    variant = get_variant(shape.variant)
    build = BuildContext(variant=variant, seed=0, device=device, total_steps=1)
    model = random_transformer(variant, device)
    if shape.swap_all:
        model.requires_grad_(requires_grad=False)
        blocks = list(model.blocks)
        model.blocks.swap = BlockSwap(blocks, len(blocks), streams_of(device))
    adapter = LoRA(LoRA.Config(rank=RANK), build)
    adapter.inject(model, seed=0)
    model.gradient_checkpointing = True
    parameters = list(adapter.trainable().values())
    optimizer = AdamW(AdamW.Config(), build).build([{"params": parameters}], lr=1e-4)
    latents, context = _inputs(shape, variant, device)
    seconds = []
    _reset_peak(device)
    for _ in range(repeats + 1):
        start = _now(device)
        velocity = model(latents, torch.tensor([640.0], device=device), [context])
        velocity.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(_now(device) - start)
    tokens = latents[0, 0].numel() // 4
    return {
        "step_s": round(statistics.median(seconds[1:]), 3),  # the first one warms up
        "peak_vram_gib": _peak_gib(device),
        "tokens": tokens,
    }


def random_transformer(variant: Variant, device: torch.device) -> WanTransformer:
    """Return a model with the variant's shapes and small random bf16 weights, made on `device`."""
    with torch.device("meta"):
        model = WanTransformer(variant.transformer, seed=None)
    for name, parameter in list(model.named_parameters()):
        dtype = torch.float32 if name.startswith(FLOAT32_MODULES) else torch.bfloat16
        fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value.normal_(std=fan_in**-0.5 if parameter.dim() > 1 else 0.02)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value))
    return model


def _inputs(shape: Shape, variant: Variant, device: torch.device) -> tuple[Tensor, Tensor]:
    frames, height, width = variant.vae_stride
    size = ((shape.num_frames - 1) // frames + 1, shape.height // height, shape.width // width)
    latents = torch.randn((1, variant.latent_channels, *size), device=device)
    return latents, torch.randn((TEXT_TOKENS, variant.transformer.text_dim), device=device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_reserved(device) / 2**30, 2)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
