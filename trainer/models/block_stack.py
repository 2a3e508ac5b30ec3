"""The loop over transformer blocks: hooks around them, gradient checkpointing inside.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from trainer.core.forward_values import remembered
from trainer.core.seams import BlockHook, BlockState
from trainer.memory.block_swap import BlockSwap
from trainer.memory.checkpoint_offload import CheckpointOffload

BlockArguments = Callable[[Tensor | None], tuple[Any, ...]]
"""Given the positions of the tokens present (None: all), what a block takes beside tokens."""

Around = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Given the tokens and what runs the blocks, returns the tokens after the last block."""

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

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
            A number k: so with every k-th block only, from the first one on.
        keep_attention: with it, keep the attention outputs too. Saves recomputing them (a ninth
            of a step that attention dominates) for twice the memory a block.
        swap: streams the frozen weights of blocks from RAM; None: all are on the device.
        offload: parks the inputs that are kept in RAM; None: they stay on the device.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.gradient_checkpointing: bool | int = False
        self.keep_attention = False
        self.swap: BlockSwap | None = None
        self.offload: CheckpointOffload | None = None
        self._hooks: list[BlockHook] = []
        self._left_out: frozenset[int] = frozenset()
        self._around: Around | None = None

    @property
    def hooks(self) -> tuple[BlockHook, ...]:
        """The hooks that run, in the order of their before-half; () while suspended."""
        return tuple(self._hooks)

    @property
    def as_given(self) -> bool:
        """Whether the first block is surely given the tokens that come in."""
        return not self._hooks and self._around is None

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

    @contextmanager
    def leaving_out(self, indices: Collection[int]) -> Iterator[None]:
        """Run as if the stack had been made without the blocks at `indices`.

        Raises:
            IndexError: there is no such block.
        """
        missing = [index for index in indices if not 0 <= index < len(self)]
        if missing:
            raise IndexError(f"block {missing[0]} of {len(self)}")
        before, self._left_out = self._left_out, frozenset(indices)
        try:
            yield
        finally:
            self._left_out = before

    @contextmanager
    def surrounded(self, around: Around) -> Iterator[None]:
        """Let `around` say what becomes of the tokens; it may run the blocks, or not."""
        before, self._around = self._around, around
        try:
            yield
        finally:
            self._around = before

    def forward(self, tokens_BLD: Tensor, arguments: BlockArguments) -> Tensor:
        """Return the tokens after the last block, (B, L, D)."""
        if self._around is None:
            return self._through(tokens_BLD, arguments)
        return self._around(tokens_BLD, partial(self._through, arguments=arguments))

    def _through(self, tokens_BLD: Tensor, arguments: BlockArguments) -> Tensor:
        if self.swap is None:
            return self._forward(tokens_BLD, arguments)
        with self.swap.forward(returns=torch.is_grad_enabled(), without=self._left_out):
            return self._forward(tokens_BLD, arguments)

    def _forward(self, tokens_BLD: Tensor, arguments: BlockArguments) -> Tensor:
        state = BlockState(tokens_BLD=tokens_BLD)
        hooks = self.hooks
        for index in range(len(self)):
            if index in self._left_out:
                continue
            for hook in hooks:
                state = hook.before_block(index, state)
            tokens_BLD = self._run(index, state.tokens_BLD, arguments(state.kept_L))
            state = replace(state, tokens_BLD=tokens_BLD)
            for hook in reversed(hooks):
                state = hook.after_block(index, state)
        return state.tokens_BLD

    def _recomputes(self, index: int) -> bool:
        """Tell whether block `index` keeps only its input."""
        if not self.gradient_checkpointing or index % int(self.gradient_checkpointing):
            return False
        # The backward starts with the last block: what it would recompute, it needs at once.
        return index < len(self) - 1

    def _run(self, index: int, tokens_BLD: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        block, grad = self[index], torch.is_grad_enabled()
        if grad and self._recomputes(index):
            contexts = partial(self._contexts, index)
            with nullcontext() if self.offload is None else self.offload.parking(tokens_BLD):
                result = checkpoint(
                    block, tokens_BLD, *arguments, use_reentrant=False, context_fn=contexts
                )
        elif self.swap is None:
            result = block(tokens_BLD, *arguments)
        else:
            self.swap.need(index)
            with self.swap.keeping() if grad else nullcontext():
                result = block(tokens_BLD, *arguments)
            if result.requires_grad:
                # A block that recomputes parts of itself uses its weights before autograd asks.
                result.register_hook(partial(self._ask_for, index))
        tokens: Tensor = result
        return tokens

    def _ask_for(self, index: int, _grad_BLD: Tensor) -> None:
        """Make a streamed block ready when its backward begins."""
        if self.swap is not None:
            self.swap.need(index)

    def _contexts(self, index: int) -> _Contexts:
        """Return what surrounds a checkpointed block in the forward and in its recomputation."""
        contexts: _Contexts = (nullcontext(), nullcontext())
        if self.keep_attention:
            contexts = create_selective_checkpoint_contexts(_keep_attention)  # type: ignore[no-untyped-call]
        # Outermost: what keeps results by the order of operators must see the same ones twice.
        forward, again = contexts
        again = remembered(again)
        if self.swap is None:
            return forward, again
        return _Needing(self.swap, index, forward), _Needing(self.swap, index, again)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)`: streamed blocks need no device memory while the model is away."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own gap
        if self.swap is not None and fn(torch.empty(0)).device != self.swap.device:
            self.swap.release()
        return self


class _Needing:
    """Makes a block's weights ready, then enters another context."""

    def __init__(self, swap: BlockSwap, index: int, inner: AbstractContextManager[Any]) -> None:
        self._swap = swap
        self._index = index
        self._inner = inner

    def __enter__(self) -> None:
        self._swap.need(self._index)
        self._inner.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._inner.__exit__(kind, error, trace)


def _keep_attention(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operator.name().removeprefix("aten::").partition(".")[0]
    keep = name in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
