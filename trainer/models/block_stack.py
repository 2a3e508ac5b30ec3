"""The loop over transformer blocks: hooks around them, gradient checkpointing inside.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from trainer.core.seams import BlockHook, BlockState

BlockArguments = Callable[[Tensor | None], tuple[Any, ...]]
"""Given the positions of the tokens present (None: all), what a block takes beside tokens."""

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


class BlockStack(nn.ModuleList):
    """Transformer blocks that run one after the other.

    Hooks see a block's input and output and may replace the tokens. They run outside the
    checkpoint: a hook inside would run again while the backward recomputes the block.

    Attributes:
        gradient_checkpointing: keep only each block's input and recompute the rest in backward;
            the last block is kept whole: its backward, which comes first, is the peak anyway.
        keep_attention: with it, keep the attention outputs too. Saves recomputing them (a ninth
            of a step that attention dominates) for twice the memory a block.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.gradient_checkpointing = False
        self.keep_attention = False
        self._hooks: list[BlockHook] = []

    @property
    def hooks(self) -> tuple[BlockHook, ...]:
        """The hooks that run, in the order of their before-half; () while suspended."""
        return tuple(self._hooks)

    def add_hooks(self, hooks: Iterable[BlockHook]) -> None:
        """Append `hooks`: before-halves run in this order, after-halves in reverse."""
        self._hooks.extend(hooks)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Switch all hooks off, for a forward whose features no technique may see or change."""
        hooks, self._hooks = self._hooks, []
        try:
            yield
        finally:
            self._hooks = hooks

    def forward(self, tokens_BLD: Tensor, arguments: BlockArguments) -> Tensor:
        """Return the tokens after the last block, (B, L, D)."""
        state = BlockState(tokens_BLD=tokens_BLD)
        hooks = self.hooks
        for index, block in enumerate(self):
            for hook in hooks:
                state = hook.before_block(index, state)
            # The backward starts with the last block: what it would recompute, it needs at once.
            recompute = self.gradient_checkpointing and index < len(self) - 1
            tokens_BLD = self._run(
                block, state.tokens_BLD, arguments(state.kept_L), recompute=recompute
            )
            state = replace(state, tokens_BLD=tokens_BLD)
            for hook in reversed(hooks):
                state = hook.after_block(index, state)
        return state.tokens_BLD

    def _run(
        self, block: nn.Module, tokens_BLD: Tensor, arguments: tuple[Any, ...], *, recompute: bool
    ) -> Tensor:
        if not (recompute and torch.is_grad_enabled()):
            result = block(tokens_BLD, *arguments)
        elif self.keep_attention:
            context = partial(create_selective_checkpoint_contexts, _keep_attention)
            result = checkpoint(
                block, tokens_BLD, *arguments, use_reentrant=False, context_fn=context
            )
        else:
            result = checkpoint(block, tokens_BLD, *arguments, use_reentrant=False)
        tokens: Tensor = result
        return tokens


def _keep_attention(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().removeprefix("aten::").partition(".")[0]
    keep = name in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
