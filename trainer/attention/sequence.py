"""Several processes share the tokens of a clip: each holds a part, attention sees all of them.

DeepSpeed-Ulysses (arXiv:2309.14509): everything in a block but self-attention works token by token.
In front of self-attention the processes exchange a part of the tokens with all heads for all tokens
with a part of the heads; behind it they exchange back.

Gradients: what a process computes from its part gives a part of the gradient of every weight. The
engine takes the mean over all processes, as of losses that have nothing to do with one another. So
`gather`, where the processes meet again, has the backward of that mean: it adds up what each
process's loss says about this part. Those losses are the same one, so the gradient behind it comes
out P times, the engine's mean over the P processes takes one P-th of it, and their sum is whole.
Weights in front of the split or behind `gather` need no factor: in front, each process's gradient
comes through its own part; behind, each has the whole gradient, and the mean of equals is the same.

Shape letters: B batch, L tokens of the clip, N heads, K head size, E any width, P processes;
M tokens of a part: ⌈L / P⌉, H heads of a part: N / P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.attention.base import AttentionBackend


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The processes that share clips, and this one's place among them.

    The last parts are filled up to ⌈L / P⌉ with repeats of the last token. No token attends to
    them, and what becomes of them is dropped, so they change neither result nor gradient.
    """

    rank: int
    size: int
    process_group: Any
    """Of torch.distributed, with these processes and no others."""

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return which of a clip's tokens are in this process's part, (M,) int64."""
        part = -(-num_tokens // self.size)
        places_M = torch.arange(self.rank * part, (self.rank + 1) * part, device=device)
        return places_M.clamp_(max=num_tokens - 1)

    def attention(self, attend: AttentionBackend, num_tokens: int) -> AttentionBackend:
        """Return attention among all tokens of a clip, to be given this process's part."""
        return _SharedAttention(self, attend, num_tokens, _uncompiled_exchange())

    def gather(self, part_BME: Tensor, num_tokens: int) -> Tensor:
        """Return what the processes have of each token, (B, L, E), on all. A collective call."""
        parts_PBME: Tensor = _gather(part_BME, self)
        return _side_by_side(parts_PBME)[:, :num_tokens]


class _SharedAttention:
    """Attention that is given a part of the tokens and sees all, for a part of the heads."""

    takes_bias = False

    def __init__(
        self,
        group: SequenceGroup,
        attend: AttentionBackend,
        num_tokens: int,
        exchange: Callable[[Tensor, SequenceGroup], Tensor],
    ) -> None:
        self._group = group
        self._attend = attend
        self._num_tokens = num_tokens
        self._exchange = exchange

    def __call__(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_BS: Tensor | None = None
    ) -> Tensor:
        """Return this process's part, (B, M, N, K). A collective call."""
        if bias_BS is not None:
            raise ValueError("attention among tokens that processes share takes no bias")
        q, k, v = (self._all_tokens(part) for part in (q_BLNK, k_BSNK, v_BSNK))
        return self._all_heads(self._attend(q, k, v))

    def _all_tokens(self, part_BMNK: Tensor) -> Tensor:
        """(B, M, N, K), a part of the tokens, to (B, L, H, K), a part of the heads."""
        batch, part, heads, width = part_BMNK.shape
        size = self._group.size
        cut = part_BMNK.reshape(batch, part, size, heads // size, width)
        by_reader = cut.permute(2, 0, 1, 3, 4)
        return _side_by_side(self._exchange(by_reader, self._group))[:, : self._num_tokens]

    def _all_heads(self, seen_BLHK: Tensor) -> Tensor:
        """(B, L, H, K), a part of the heads, to (B, M, N, K), a part of the tokens."""
        batch, _, *rest = seen_BLHK.shape
        size = self._group.size
        missing = -self._num_tokens % size
        if missing:
            filling = seen_BLHK.new_zeros(batch, missing, *rest)
            seen_BLHK = torch.cat((seen_BLHK, filling), dim=1)
        by_reader = seen_BLHK.reshape(batch, size, -1, *rest).transpose(0, 1)
        return self._exchange(by_reader, self._group).permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Send slice p of dim 0 to process p; slice p of the result came from it."""

    @staticmethod
    def forward(ctx: Any, slices: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(slices, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None  # its own transpose


class _Gather(torch.autograd.Function):
    """Give every process the parts of all, stacked; the gradient of a part comes from all."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        parts = part.new_empty(group.size, *part.shape)
        # The form that every supported version of torch has without a warning.
        dist.all_gather(list(parts.unbind()), part.contiguous(), group=group.process_group)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group).sum(0, dtype=torch.float32).to(grad.dtype), None


def _all_to_all(slices: Tensor, group: SequenceGroup) -> Tensor:
    slices = slices.contiguous()
    received = torch.empty_like(slices)
    dist.all_to_all_single(received, slices, group=group.process_group)
    return received


def _side_by_side(parts_PBM: Tensor) -> Tensor:
    """(P, B, M, ...), the parts of P processes, to (B, P · M, ...)."""
    return parts_PBM.transpose(0, 1).flatten(1, 2)


_gather = cast("Callable[..., Tensor]", _Gather.apply)


@cache
def _uncompiled_exchange() -> Callable[..., Tensor]:
    """Return the exchange as a function that compiled blocks break off at.

    A compiler must not move a call that other processes wait for. Not made on import: that would
    load the compiler.
    """
    disable: Any = torch.compiler.disable
    return cast("Callable[..., Tensor]", disable(_Exchange.apply))
