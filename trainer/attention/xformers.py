"""Memory-efficient attention of the package xformers (Lefaudeux et al.)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from trainer.attention.base import AttentionNeeds
from trainer.attention.unbiased import UnbiasedAttention


class XformersAttention(UnbiasedAttention):
    """`xformers.ops.memory_efficient_attention`: (B, L, N, K) in, the same out.

    It takes a bias as a full matrix over queries and keys only, which text does not deserve.
    """

    needs: ClassVar[AttentionNeeds] = AttentionNeeds(
        module="xformers", install="install it: pip install xformers", capability=(7, 0)
    )

    def __init__(self) -> None:
        """Import the package."""
        from xformers.ops import memory_efficient_attention

        super().__init__()
        self._kernel: Callable[..., Tensor] = memory_efficient_attention

    def _attend(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        return self._kernel(q_BLNK, k_BSNK, v_BSNK)
