"""Seconds of a training step: floating-point operations, traffic, and what a GPU reaches."""

from __future__ import annotations

from trainer.contract.memory_model.flops import ATTENTION_BACKWARD, step_flops
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.offload import optimizer_place
from trainer.contract.memory_model.traffic import Pace, traffic_parts
from trainer.contract.memory_model.weights import block_linear_parameters
from trainer.contract.memory_model.workload import Workload

POINTWISE_BYTES = 500
"""Bytes read and written a token and channel in a block and step, in bf16, beside products."""
FP8_GAIN = 1.75
"""How much faster fp8 products are than bf16 ones, quantising included."""
MEMORY_SHARE = 0.88
"""Share of the named memory bandwidth that is reached."""


def peak_rate(gpu: Gpu, element: int) -> float:
    """Return the GPU's operations a second for elements of 2 or 4 bytes; 0: not known."""
    if not gpu.bf16_tflops or not gpu.memory_gb_s:
        return 0.0
    return gpu.bf16_tflops * 1e12 * (1.0 if element == 2 else 0.25)


def step_parts(work: Workload, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of one weight update by what takes them; {} for an unknown GPU."""
    peak = peak_rate(gpu, work.element)
    if not peak:
        return {}
    shape = work.shape
    flops = step_flops(work)
    repeats = work.config.training.gradient_accumulation_steps
    blocks = shape.num_layers * repeats
    gain = FP8_GAIN if work.fp8 == "products" and gpu.fp8_tflops else 1.0
    forward_share, backward_share = gpu.attention_forward, gpu.attention_backward
    products = flops.matmul * flops.matmul_passes + flops.matmul_again
    parts = {
        "products": products / (peak * gpu.matmul * gain),
        "LoRA": flops.lora * (3 + flops.again) / (peak * gpu.matmul),
        "attention": flops.attention
        * ((1 + flops.attention_again) / forward_share + ATTENTION_BACKWARD / backward_share)
        / peak,
        "pointwise": blocks
        * POINTWISE_BYTES
        * (work.element / 2)
        * work.rows
        * shape.dim
        / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE),
        "update": _updated_here(work) * 28.0 / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE),
    }
    if work.fp8 == "dequantised":
        # Reads a byte and writes two an element, and twice more to put the scales in.
        elements = block_linear_parameters(shape) * (2 + flops.again)
        parts["fp8 to bf16"] = blocks * elements * 7 / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    forward = (flops.matmul / gpu.matmul + flops.attention / forward_share) / peak
    backward = sum(parts.values()) - parts["update"] - forward
    parts |= traffic_parts(work, gpu, Pace(forward=forward, backward=backward))
    return {name: seconds for name, seconds in parts.items() if seconds}


def _updated_here(work: Workload) -> float:
    """Return the parameters that the GPU updates."""
    if optimizer_place(work) != "none":
        return 0.0
    return work.trained_parameters / (work.world_size if work.zero_stage else 1)
