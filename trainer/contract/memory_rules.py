"""What goes with what in `[memory]` where blocks are streamed, recomputed or compiled."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.variants import VARIANTS

SWAP_KEY = "memory.blocks_to_swap"


def too_many_blocks(wanted: int, num_blocks: int) -> Problem | None:
    """Return what is wrong with streaming `wanted` blocks of a model that has `num_blocks`."""
    if wanted <= num_blocks:
        return None
    return Problem(
        f"{wanted} blocks to swap, but the model has {num_blocks}",
        SWAP_KEY,
        hint=f"set it to {num_blocks} or less",
    )


def streaming_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield where block swap and the rest of the config exclude one another."""
    wanted = config.memory.blocks_to_swap
    if not wanted:
        return
    known = VARIANTS.get(config.model.variant)
    if known is not None and wanted != "auto" and "num_layers" not in config.model.shape:
        problem = too_many_blocks(wanted, known.transformer.num_layers)
        if problem is not None:
            yield problem
    if not config.memory.gradient_checkpointing:
        yield Problem(
            "without gradient checkpointing the activations take what swapping saves",
            SWAP_KEY,
            hint="set memory.gradient_checkpointing = true, or blocks_to_swap = 0",
        )
    if config.distributed.zero_stage == 3:
        yield Problem(
            "ZeRO-3 shards the frozen blocks over the GPUs already; both would move the same "
            "weights",
            SWAP_KEY,
            hint="set distributed.zero_stage = 0, 1 or 2, or blocks_to_swap = 0",
        )
    if config.adapter.kind == "none":
        yield Problem(
            "swapped blocks are frozen, and a full fine-tune trains all of them",
            SWAP_KEY,
            hint='set adapter.kind = "lora", or blocks_to_swap = 0 and distributed.zero_stage = 3, '
            "which shards the weights",
        )


def activations_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield options of gradient checkpointing that have no meaning without it."""
    if config.memory.gradient_checkpointing:
        return
    for field in ("keep_attention", "offload_checkpoints"):
        if getattr(config.memory, field):
            yield Problem(
                "without gradient checkpointing everything is kept anyway",
                f"memory.{field}",
                hint="leave it out, or set memory.gradient_checkpointing = true",
            )


def compile_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what a compiled block cannot do."""
    if not config.memory.compile_blocks:
        return
    key = "memory.compile_blocks"
    if config.memory.keep_attention:
        yield Problem(
            "inside a compiled block single operators cannot be told apart, so that attention "
            "alone cannot be kept",
            key,
            hint="set memory.keep_attention = false, or compile_blocks = false",
        )
    if config.distributed.zero_stage == 3:
        yield Problem(
            "ZeRO-3 gathers weights by hooks inside the blocks, which compiling breaks apart",
            key,
            hint="set distributed.zero_stage = 0, 1 or 2, or compile_blocks = false",
        )
    for field, part in (
        ("feed_forward_chunks", "the feed-forward"),
        ("attention_chunks", "what enters attention"),
    ):
        if getattr(config.memory, field) > 1:
            yield Problem(
                f"the compiler plans {part} itself; its parts cannot be recomputed one by one",
                key,
                hint=f"set memory.{field} = 1, or compile_blocks = false",
            )
