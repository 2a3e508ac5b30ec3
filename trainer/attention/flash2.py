"""FlashAttention-2 (Dao, arXiv:2307.08691), by the package flash-attn."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from trainer.attention.base import AttentionNeeds
from trainer.attention.unbiased import UnbiasedAttention


class Flash2Attention(UnbiasedAttention):
    """`flash_attn.flash_attn_func`: (B, L, N, K) in, the same out."""

    needs: ClassVar[AttentionNeeds] = AttentionNeeds(
        module="flash_attn",
        install="install it: pip install flash-attn --no-build-isolation",
        dtypes=(torch.bfloat16, torch.float16),
        capability=(8, 0),
    )

    def __init__(self) -> None:
        """Import the package."""
        from flash_attn import flash_attn_func

        super().__init__()
        self._kernel: Callable[..., Tensor] = flash_attn_func

    def _attend(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        return self._kernel(q_BLNK, k_BSNK, v_BSNK)
