"""Self- and cross-attention of a Wan block.

Shape letters: B batch, L tokens, T text tokens, S keys, D width, N heads, K head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.attention.base import AttentionBackend
from trainer.models.wan.rope import HeadNorm


class SelfAttention(nn.Module):
    """Attention among the video tokens, with rotary positions."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = HeadNorm(dim, num_heads, eps)
        self.norm_k = HeadNorm(dim, num_heads, eps)

    def forward(self, tokens_BLD: Tensor, rope_LK: Tensor, attend: AttentionBackend) -> Tensor:
        """Return the update of the tokens, (B, L, D)."""
        q_BLNK = self.norm_q(self.q(tokens_BLD), rope_LK)
        k_BLNK = self.norm_k(self.k(tokens_BLD), rope_LK)
        v_BLNK = self.v(tokens_BLD).unflatten(-1, (self.num_heads, -1))
        update: Tensor = self.o(attend(q_BLNK, k_BLNK, v_BLNK).flatten(2))
        return update


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text and, with `image`, to CLIP tokens as well."""

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

    def forward(
        self,
        tokens_BLD: Tensor,
        context_BTD: Tensor,
        bias_BT: Tensor | None,
        image_BSD: Tensor | None,
        attend: AttentionBackend,
    ) -> Tensor:
        """Return the update of the tokens, (B, L, D)."""
        q_BLNK = self.norm_q(self.q(tokens_BLD))
        k_BTNK = self.norm_k(self.k(context_BTD))
        v_BTNK = self.v(context_BTD).unflatten(-1, (self.num_heads, -1))
        seen = attend(q_BLNK, k_BTNK, v_BTNK, bias_BT)
        if self.image:
            k_BSNK = self.norm_k_img(self.k_img(image_BSD))
            v_BSNK = self.v_img(image_BSD).unflatten(-1, (self.num_heads, -1))
            seen = seen + attend(q_BLNK, k_BSNK, v_BSNK)
        update: Tensor = self.o(seen.flatten(2))
        return update
