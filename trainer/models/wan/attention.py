"""Self- and cross-attention of a Wan block, each with the norm in front of it.

Shape letters: B batch, L tokens, T text tokens, S keys, D width, N heads, K head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.attention.base import AttentionBackend
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
    ) -> Tensor:
        """Return the update of the tokens, (B, L, D); `norm` is applied to them first."""

        def look(tokens_BLD: Tensor, _span: slice, *seen: Tensor) -> tuple[Tensor]:
            q_BLNK = self.norm_q(self.q(norm(tokens_BLD)))
            mixed = attend(q_BLNK, seen[0], seen[1], bias_BT)
            if self.image:
                mixed = mixed + attend(q_BLNK, seen[2], seen[3])
            return (self.o(mixed.flatten(2)),)

        keys_and_values = [
            self.norm_k(self.k(context_BTD)),
            self.v(context_BTD).unflatten(-1, (self.num_heads, -1)),
        ]
        if self.image:
            keys_and_values += [
                self.norm_k_img(self.k_img(image_BSD)),
                self.v_img(image_BSD).unflatten(-1, (self.num_heads, -1)),
            ]
        (update,) = in_parts(look, self.chunks, tokens_BLD, *keys_and_values)
        return update
