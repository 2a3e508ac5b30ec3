"""The effective update of a low-rank pair, and what can be said of it without forming it."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.adapters.base import LoRAFactors


def delta(factors: LoRAFactors, strength: float = 1.0) -> Tensor:
    """Return strength · alpha / rank · up @ down, (O, I), float32 on the factors' device."""
    up, down = factors.up_OR.float(), factors.down_RI.float()
    return (up @ down).mul_(strength * factors.scale)


def add_delta(weight_OI: Tensor, factors: LoRAFactors, strength: float = 1.0) -> Tensor:
    """Return weight + delta in the weight's dtype; the sum is formed in float32."""
    summed = delta(factors, strength).to(weight_OI.device)
    return summed.add_(weight_OI.float()).to(weight_OI.dtype)


def frobenius_norm(factors: LoRAFactors) -> float:
    """Return the Frobenius norm of the delta from two R x R products.

    ‖BA‖² = trace((BᵀB)(AAᵀ)); in float64, because the products' errors are squared.
    """
    up, down = factors.up_OR.double(), factors.down_RI.double()
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return abs(factors.scale) * float(squared.sqrt())


def fold_scale(factors: LoRAFactors) -> LoRAFactors:
    """Return the same update with alpha = rank, so that a reader without alpha scales by 1.

    The scale goes into the up factor, in float32; unchanged tensors when it is 1 already.
    """
    if factors.scale == 1.0:
        return factors
    up = factors.up_OR.float() * factors.scale
    return LoRAFactors(factors.down_RI.to(torch.float32), up, float(factors.rank))
