"""Self- and cross-attention of a Wan block, each with the norm in front of it.

Shape letters: B batch, L tokens, T text tokens, S keys, D width, N heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.attention.base import AttentionBackend
from trainer.models.wan.kept import Kept
from trainer.models.wan.rope import HeadNorm
from trainer.models.wan.token_parts import PartNorm, in_parts


class SelfAttention(nn.Module):
    """Attention among the video tokens, with rotary positions.

    Attributes:
        chunks: queries, keys and values are made in so many parts of the tokens, which are
            recomputed one by one in the backward: of the normed tokens and of the projections
            before their norm only one part exists at a time.
    """

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = HeadNorm(dim, num_heads, eps)
        self.norm_k = HeadNorm(dim, num_heads, eps)
        self.chunks = 1

    def forward(
        self, tokens_BLD: Tensor, norm: PartNorm, rope_LK: Tensor, attend: AttentionBackend
    ) -> Tensor:
        """Return the update of the tokens, (B, L, D); `norm` is applied to them first."""

        def project(tokens_BLD: Tensor, span: slice) -> tuple[Tensor, Tensor, Tensor]:
            normed_BLD, turn_LK = norm(tokens_BLD, span), rope_LK[span]
            q_BLNK = self.norm_q(self.q(normed_BLD), turn_LK)
            k_BLNK = self.norm_k(self.k(normed_BLD), turn_LK)
            return q_BLNK, k_BLNK, self.v(normed_BLD).unflatten(-1, (self.num_heads, -1))

        q_BLNK, k_BLNK, v_BLNK = in_parts(project, self.chunks, tokens_BLD)
        update: Tensor = self.o(attend(q_BLNK, k_BLNK, v_BLNK).flatten(2))
        return update


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text and, with `image`, to CLIP tokens as well.

    Attributes:
        chunks: all of it runs over so many parts of the video tokens, which do not see one
            another here, and each is recomputed in the backward.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, *, image: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = HeadNorm(dim, num_heads, eps)
        self.norm_k = HeadNorm(dim, num_heads, eps)
        self.image = image
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = HeadNorm(dim, num_heads, eps)
        self.chunks = 1

    def forward(
        self,
        tokens_BLD: Tensor,
        norm: nn.Module,
        context_BTD: Tensor,
        bias_BT: Tensor | None,
        image_BSD: Tensor | None,
        attend: AttentionBackend,
        kept: Kept | None = None,
    ) -> Tensor:
        """Return the update of the tokens, (B, L, D); `norm` is applied to them first.

        Keys and values are taken from `kept` where they are in it.
        """

        def look(tokens_BLD: Tensor, _span: slice, *seen: Tensor) -> tuple[Tensor]:
            q_BLNK = self.norm_q(self.q(norm(tokens_BLD)))
            mixed = attend(q_BLNK, seen[0], seen[1], bias_BT)
            if self.image:
                mixed = add(attend(q_BLNK, seen[2], seen[3]), mixed)
            return (self.o(mixed.flatten(2)),)

        keys_and_values = [*self._seen(kept, context_BTD, (self.k, self.norm_k, self.v))]
        if self.image:
            layers = (self.k_img, self.norm_k_img, self.v_img)
            keys_and_values += self._seen(kept, image_BSD, layers)
        (update,) = in_parts(look, self.chunks, tokens_BLD, *keys_and_values)
        return update

    def _seen(
        self, kept: Kept | None, seen_BSD: Tensor | None, layers: Sequence[nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of what the tokens look at, (B, S, N, K) each."""
        to_key, norm, to_value = layers

        def make() -> tuple[Tensor, Tensor]:
            key_BSNK: Tensor = norm(to_key(seen_BSD))
            return key_BSNK, to_value(seen_BSD).unflatten(-1, (self.num_heads, -1))

        return make() if kept is None else kept.get((seen_BSD,), layers, make)


def add(update: Tensor, tokens: Tensor) -> Tensor:
    """Return the sum; in the memory of `update` where no backward needs it."""
    if torch.is_grad_enabled() or update.dtype != tokens.dtype:
        return tokens + update
    return update.add_(tokens)
