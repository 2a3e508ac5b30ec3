"""Attention by torch itself."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from trainer.attention.base import AttentionNeeds


class TorchAttention:
    """`torch.nn.functional.scaled_dot_product_attention`; torch picks the kernel."""

    needs: ClassVar[AttentionNeeds] = AttentionNeeds()
    takes_bias = True

    def __call__(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_BS: Tensor | None = None
    ) -> Tensor:
        """Return (B, L, N, K)."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNK, k_BSNK, v_BSNK))
        mask = None if bias_BS is None else bias_BS[:, None, None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
