"""FlashAttention-3 (Shah et al., arXiv:2407.08608), for Hopper GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from trainer.attention.base import AttentionNeeds
from trainer.attention.unbiased import UnbiasedAttention


class Flash3Attention(UnbiasedAttention):
    """`flash_attn_interface.flash_attn_func`: (B, L, N, K) in, the same out.

    Releases differ in whether the log-sum-exp comes along.
    """

    needs: ClassVar[AttentionNeeds] = AttentionNeeds(
        module="flash_attn_interface",
        install="build flash-attn-3: the folder hopper/ of github.com/Dao-AILab/flash-attention",
        dtypes=(torch.bfloat16, torch.float16),
        capability=(9, 0),
    )

    def __init__(self) -> None:
        """Import the package."""
        from flash_attn_interface import flash_attn_func

        super().__init__()
        self._kernel: Callable[..., Tensor | tuple[Tensor, ...]] = flash_attn_func

    def _attend(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        result = self._kernel(q_BLNK, k_BSNK, v_BSNK)
        return result[0] if isinstance(result, tuple) else result
