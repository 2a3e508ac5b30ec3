"""SageAttention: queries and keys in 8 bits (Zhang et al., arXiv:2410.02367). No backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from trainer.attention.base import AttentionNeeds
from trainer.attention.unbiased import UnbiasedAttention


class SageAttention(UnbiasedAttention):
    """`sageattention.sageattn` in the layout NHD: (B, L, N, K) in, the same out."""

    needs: ClassVar[AttentionNeeds] = AttentionNeeds(
        module="sageattention",
        install="install it: pip install sageattention",
        dtypes=(torch.bfloat16, torch.float16),
        capability=(8, 0),
        trains=False,
    )

    def __init__(self) -> None:
        """Import the package."""
        from sageattention import sageattn

        super().__init__()
        self._kernel: Callable[..., Tensor] = sageattn

    def _attend(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        return self._kernel(q_BLNK, k_BSNK, v_BSNK, tensor_layout="NHD", is_causal=False)
