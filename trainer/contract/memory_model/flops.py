"""Floating-point operations of a training step: what is needed, and what is computed.

A product of (N, I) and (I, O) is 2·N·I·O. The backward of a frozen layer is one product of that
size, that of a trained one two. Attention is 4·N·S·D forward (S keys) and twice that backward;
its kernels keep no scores and compute them again, so that 2.5 times are carried out.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.contract.memory_model.weights import block_layers
from trainer.contract.memory_model.workload import Workload

ATTENTION_BACKWARD = 2.5
"""Products of its backward by those of its forward, as kernels carry it out."""
_ATTENTION_NEEDED = 2.0
"""The same without the scores that are computed once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """One weight update of one process: all its microbatches, all blocks.

    Left out is what is outside the blocks and what is no product: less than one per cent.
    """

    matmul: float
    """Products of the forward."""
    matmul_passes: float
    """How often products of that size are computed: forward, gradients, recomputing."""
    matmul_again: float
    """Products that are recomputed beyond that, for what is computed in chunks."""
    attention: float
    """Attention of the forward."""
    attention_again: float
    """Share of it that is recomputed."""
    lora: float
    """Products of the LoRA's forward."""
    again: float
    """Share of the blocks that is recomputed."""
    own_share: float
    """Share of the products whose weights are trained themselves."""

    @property
    def forward(self) -> float:
        """A forward alone."""
        return self.matmul + self.attention + self.lora

    @property
    def needed(self) -> float:
        """Forward and backward if nothing had to be computed twice: what MFU counts."""
        matmul = self.matmul * (2 + self.own_share)
        return matmul + self.attention * (1 + _ATTENTION_NEEDED) + 3 * self.lora

    @property
    def computed(self) -> float:
        """All that is computed, recomputing included."""
        return (
            self.matmul * self.matmul_passes
            + self.matmul_again
            + self.attention * (1 + self.attention_again + ATTENTION_BACKWARD)
            + self.lora * (3 + self.again)
        )


def step_flops(work: Workload) -> StepFlops:
    """Return the operations of one weight update."""
    shape, rows, memory = work.shape, work.rows, work.config.memory
    layers = block_layers(shape)
    text_rows = work.clip.batch * shape.text_len
    on_text = {"cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img"}
    matmul = sum(
        2.0 * (text_rows if name in on_text else rows) * inputs * outputs
        for name, (inputs, outputs) in layers.items()
    )
    lora = sum(
        2.0 * rows * layer.branch.width * sum(layers[name])
        for block in work.targets.blocks
        for name, layer in block.layers
    )
    attention = 4.0 * rows * (work.tokens + shape.text_len) * shape.dim
    again = work.recomputed / shape.num_layers
    chunked = 4.0 * rows * shape.dim * shape.ffn_dim if memory.feed_forward_chunks > 1 else 0.0
    if memory.attention_chunks > 1:  # q, k, v, and of cross-attention q and o
        chunked += 5 * 2.0 * rows * shape.dim**2
    repeats = work.config.training.gradient_accumulation_steps
    blocks = shape.num_layers * repeats
    return StepFlops(
        matmul=blocks * matmul,
        matmul_passes=2 + work.targets.own_share + again,
        matmul_again=blocks * chunked,
        attention=blocks * attention,
        attention_again=0 if memory.keep_attention else again,
        lora=repeats * lora,
        again=again,
        own_share=work.targets.own_share,
    )
