"""Work on rows of tokens, one part of them after the other, each done once more in the backward.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.core.forward_values import contexts

PartNorm = Callable[[Tensor, slice], Tensor]
"""Norms a part of the tokens, (B, l, D), given which tokens of all they are."""


def in_parts(
    work: Callable[..., tuple[Tensor, ...]], num: int, tokens_BLD: Tensor, *shared: Tensor
) -> tuple[Tensor, ...]:
    """Return what `work` makes of all tokens, made of `num` parts of them.

    Of what happens inside, nothing is kept but the tokens that go in; in the backward each part
    is recomputed, used and forgotten before the next one. With one part `work` just runs.

    Args:
        work: given the tokens of a part, (B, l, D), which of all tokens they are, and `shared`;
            returns tensors (B, l, ...). A row must depend on no other row. It must not hold
            activations of its own: they would live as long as the graph.
        num: parts at most; there are fewer where they would be empty.
        tokens_BLD: all tokens.
        shared: further activations that every part needs.
    """
    parts = tokens_BLD.chunk(num, dim=1)
    if len(parts) == 1:
        return work(tokens_BLD, slice(None), *shared)
    made: list[tuple[Tensor, ...]] = []
    start = 0
    for part in parts:
        span = slice(start, start + part.shape[1])
        start = span.stop
        if torch.is_grad_enabled():
            again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
            made.append(again(work, part, span, *shared))
        else:
            made.append(work(part, span, *shared))
    columns = [list(column) for column in zip(*made, strict=True)]
    made.clear()
    whole = []
    while columns:  # the parts of one result make room before the next is put together
        whole.append(torch.cat(columns.pop(0), dim=1))
    return tuple(whole)
