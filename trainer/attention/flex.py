"""FlexAttention of torch: a kernel made for the very bias that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from trainer.attention.base import AttentionNeeds


class FlexAttention:
    """`torch.nn.attention.flex_attention`: the bias of text enters the kernel as a formula.

    On a GPU the kernel is compiled (the first step takes minutes). The CPU computes the formula
    without a kernel, with the whole matrix in memory: for tests.
    """

    needs: ClassVar[AttentionNeeds] = AttentionNeeds(capability=None, trains_on_cpu=False)
    takes_bias = True

    def __init__(self) -> None:
        """Wrap the function for compiling; nothing is compiled before it is called."""
        self._compiled: Any = torch.compile(flex_attention)

    def __call__(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_BS: Tensor | None = None
    ) -> Tensor:
        """Return (B, L, N, K)."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (q_BLNK, k_BSNK, v_BSNK))
        kernel: Callable[..., Tensor] = self._compiled if q.is_cuda else flex_attention
        if bias_BS is None:
            return kernel(q, k, v).transpose(1, 2)

        def biased(
            score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            return score + bias_BS[sample, key]

        return kernel(q, k, v, score_mod=biased).transpose(1, 2)
