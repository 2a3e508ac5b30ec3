"""Seconds of a training step: floating-point operations, traffic, and what a GPU reaches."""

from __future__ import annotations

from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.weights import block_layers, block_linear_parameters
from trainer.contract.memory_model.workload import Workload

POINTWISE_BYTES = 500
"""Bytes read and written a token and channel in a block and step, in bf16, beside products."""
FP8_GAIN = 1.75
"""How much faster fp8 products are than bf16 ones, quantising included."""
COPY_COST = 0.1
"""Share of the time of a copy beside the computation that the computation loses."""
MEMORY_SHARE = 0.88
"""Share of the named memory bandwidth that is reached."""
_ATTENTION_BACKWARD = 2.5
"""Products of its backward by those of its forward."""


def step_parts(work: Workload, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of one weight update by what takes them; {} for an unknown GPU."""
    if not gpu.bf16_tflops or not gpu.memory_gb_s:
        return {}
    peak = gpu.bf16_tflops * 1e12 * (1.0 if work.element == 2 else 0.25)
    shape, rows, memory = work.shape, work.rows, work.config.memory
    layers = block_layers(shape)
    text_rows = work.clip.batch * shape.text_len
    on_text = {"cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img"}
    matmul = sum(
        2.0 * (text_rows if name in on_text else rows) * inputs * outputs
        for name, (inputs, outputs) in layers.items()
    )
    lora = sum(
        2.0 * rows * block.rank * sum(layers[name])
        for block in work.targets.blocks
        for name in block.targets
    )
    attention = 4.0 * rows * (work.tokens + shape.text_len) * shape.dim
    again = work.recomputed / shape.num_layers
    passes = (3 if work.full else 2) + again
    repeats = work.config.training.gradient_accumulation_steps
    blocks = shape.num_layers * repeats
    seen_again = 0 if memory.keep_attention else again
    feed_forward = 4.0 * rows * shape.dim * shape.ffn_dim
    matmul_again = feed_forward if memory.feed_forward_chunks > 1 else 0.0
    if memory.attention_chunks > 1:  # q, k, v, and of cross-attention q and o
        matmul_again += 5 * 2.0 * rows * shape.dim**2
    gain = FP8_GAIN if work.fp8 == "products" and gpu.fp8_tflops else 1.0
    forward_share, backward_share = gpu.attention_forward, gpu.attention_backward
    parts = {
        "products": blocks * (matmul * passes + matmul_again) / (peak * gpu.matmul * gain),
        "LoRA": repeats * lora * (3 + again) / (peak * gpu.matmul),
        "attention": blocks
        * attention
        * ((1 + seen_again) / forward_share + _ATTENTION_BACKWARD / backward_share)
        / peak,
        "pointwise": blocks
        * POINTWISE_BYTES
        * (work.element / 2)
        * rows
        * shape.dim
        / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE),
        "update": work.trained_parameters * 28.0 / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE),
    }
    if work.fp8 == "dequantised":
        # Reads a byte and writes two an element, and twice more to put the scales in.
        elements = block_linear_parameters(shape) * (2 + again)
        parts["fp8 to bf16"] = blocks * elements * 7 / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    copied = work.swapped * work.block_bytes
    if memory.offload_checkpoints:
        copied += work.recomputed * work.block_shape().tokens_bytes
    if copied:
        transfer = repeats * copied / (gpu.host_gb_s * 1e9)
        forward = blocks * (matmul / gpu.matmul + attention / forward_share) / peak
        backward = sum(parts.values()) - parts["update"] - forward
        waits = max(0.0, transfer - forward) + max(0.0, transfer - backward)
        parts["copies from and to RAM"] = waits + COPY_COST * 2 * transfer
    return {name: seconds for name, seconds in parts.items() if seconds}
