"""Operations of forwards alone: transformer, text encoder, image encoder; and what they take.

Nothing is recomputed and nothing is kept, so all that counts is products, attention, traffic of
everything else, and weights that wait in RAM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.timing import FP8_GAIN, MEMORY_SHARE, POINTWISE_BYTES, peak_rate
from trainer.contract.memory_model.traffic import beside, exchange_seconds
from trainer.contract.memory_model.weights import block_layers, block_linear_parameters
from trainer.contract.memory_model.workload import Workload
from trainer.contract.variants import TransformerConfig

_FORWARD_SHARE = 0.25
"""Of a step's pointwise traffic: it runs forward, again, and backward, which reads twice."""
CONVOLUTIONS = 0.2
"""Share of the peak that the VAEs' convolutions reach; published figures lie between 0.04 and
0.24 (docs/estimate.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFlops:
    """One forward of a transformer."""

    blocks: float
    """Products in the blocks."""
    outer: float
    """Products outside of them."""
    attention: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.blocks + self.outer + self.attention


def forward_flops(
    shape: TransformerConfig, tokens: int, *, batch: int = 1, text_rows: int | None = None
) -> ForwardFlops:
    """Return the operations of one forward, without LoRA.

    Args:
        shape: of the transformer.
        tokens: video tokens of one sample.
        batch: samples.
        text_rows: text tokens of each; None: captions of full length.
    """
    dim, patch = shape.dim, math.prod(shape.patch_size)
    text = shape.text_len if text_rows is None else text_rows
    images = 0
    if shape.image_dim:
        images = shape.image_tokens * (2 if shape.image_position_embedding else 1)
    seen_as = {"cross_attn.k": text, "cross_attn.v": text}
    seen_as |= {"cross_attn.k_img": images, "cross_attn.v_img": images}
    products = sum(
        2.0 * seen_as.get(name, tokens) * inputs * outputs
        for name, (inputs, outputs) in block_layers(shape).items()
    )
    outer = 2.0 * tokens * patch * dim * (shape.in_channels + shape.out_channels)
    outer += 2.0 * text * dim * (shape.text_dim + dim)
    outer += 2.0 * dim * (shape.freq_dim + dim + 6 * dim)  # of the timestep
    if shape.image_dim:
        outer += 2.0 * images * shape.image_dim * (shape.image_dim + dim)
    attention = 4.0 * tokens * (tokens + text + images) * dim
    return ForwardFlops(
        blocks=batch * shape.num_layers * products,
        outer=batch * outer,
        attention=batch * shape.num_layers * attention,
    )


def forward_seconds(work: Workload, gpu: Gpu, clip: Clip, *, ranks: int = 1) -> dict[str, float]:
    """Return the seconds of one forward by what takes them; {} for an unknown GPU.

    Args:
        work: says how weights are held, and the LoRA.
        gpu: the card.
        clip: what is worked on, a whole batch.
        ranks: processes that share its tokens.
    """
    peak = peak_rate(gpu, work.element)
    if not peak:
        return {}
    shape, tokens = work.shape, clip.tokens(work.variant)
    flops = forward_flops(shape, tokens, batch=clip.batch)
    gain = FP8_GAIN if work.fp8 == "products" and gpu.fp8_tflops else 1.0
    rows = clip.batch * -(-tokens // ranks)
    memory = gpu.memory_gb_s * 1e9 * MEMORY_SHARE
    pointwise = _FORWARD_SHARE * POINTWISE_BYTES * (work.element / 2) * rows * shape.dim
    parts = {
        "products": (flops.blocks / gain + flops.outer) / (ranks * peak * gpu.matmul),
        "attention": flops.attention / (ranks * peak * gpu.attention_forward),
        "pointwise": shape.num_layers * pointwise / memory,
    }
    if not work.full:
        parts["LoRA"] = 2.0 * rows * work.trained_parameters / (peak * gpu.matmul)
    if work.fp8 == "dequantised":
        parts["fp8 to bf16"] = shape.num_layers * block_linear_parameters(shape) * 7 / memory
    copied = work.swapped * work.block_bytes / (gpu.host_gb_s * 1e9)
    parts["copies from RAM"] = beside(copied, sum(parts.values()))
    parts["sequence exchange"] = exchange_seconds(
        work.block_shape(clip, ranks=ranks), ranks, shape.num_layers, gpu
    )
    return {name: seconds for name, seconds in parts.items() if seconds}


def text_flops(tokens: int) -> float:
    """Return the operations of umT5-XXL for one caption of so many tokens."""
    return _encoder_flops(
        tokens, encoders.UMT5_LAYERS, encoders.UMT5_DIM, encoders.UMT5_FFN, feed_forwards=3
    )


def text_seconds(tokens: int, gpu: Gpu, element: int) -> float:
    """Return the seconds of one caption; 0 for an unknown GPU. Each runs alone."""
    peak = peak_rate(gpu, element)
    if not peak:
        return 0.0
    # A short caption waits for the weights rather than for products.
    read = encoders.UMT5_LAYER_PARAMETERS * element / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    return max(text_flops(tokens) / (peak * gpu.matmul), read)


def image_flops() -> float:
    """Return the operations of CLIP ViT-H for one image."""
    patches = 2.0 * (encoders.CLIP_TOKENS - 1) * 3 * encoders.CLIP_PATCH**2 * encoders.CLIP_DIM
    return patches + _encoder_flops(
        encoders.CLIP_TOKENS, encoders.CLIP_LAYERS, encoders.CLIP_DIM, encoders.CLIP_FFN
    )


def image_seconds(gpu: Gpu, element: int) -> float:
    """Return the seconds of CLIP for one image; 0 for an unknown GPU."""
    peak = peak_rate(gpu, element)
    return image_flops() / (peak * gpu.matmul) if peak else 0.0


def convolution_seconds(flops: float, gpu: Gpu, element: int) -> float:
    """Return the seconds of the VAEs' operations; 0 for an unknown GPU."""
    peak = peak_rate(gpu, element)
    return flops / (peak * CONVOLUTIONS) if peak else 0.0


def _encoder_flops(
    tokens: int, layers: int, dim: int, ffn_dim: int, *, feed_forwards: int = 2
) -> float:
    """A stack of attention (heads together as wide as tokens) and feed-forward."""
    products = 8.0 * tokens * dim**2 + 2.0 * feed_forwards * tokens * dim * ffn_dim
    return layers * (products + 4.0 * tokens**2 * dim)
