"""Kernels that know no bias: they compute what has none, torch the rest.

A bias is given with the text alone, whose few keys cost little: its kernel hardly matters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from trainer.attention.sdpa import TorchAttention


class UnbiasedAttention(ABC):
    """Base of the backends whose kernel takes queries, keys and values only."""

    takes_bias = True

    def __init__(self) -> None:
        """Make the stand-in for what has a bias."""
        self._biased = TorchAttention()

    def __call__(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_BS: Tensor | None = None
    ) -> Tensor:
        """Return (B, L, N, K); with a bias, by torch."""
        if bias_BS is not None:
            return self._biased(q_BLNK, k_BSNK, v_BSNK, bias_BS)
        return self._attend(q_BLNK, k_BSNK, v_BSNK)

    @abstractmethod
    def _attend(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor: ...
