"""A linear layer with a low-rank branch beside it.

LoRA, Hu et al., arXiv:2106.09685: y = W x + b + s · B (A x), with A (R, I), B (O, R).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters.adapter_linear import AdapterLinear


class LoRALinear(AdapterLinear):
    """Adds s · B (A x) to the output of `base`.

    Autograd keeps the input, the rank-wide activations and both factors in the compute dtype, and
    no second tensor of the output's size exists.

    Args:
        base: the linear layer.
        down_RI: A; trained if it is a parameter.
        up_OR: B; likewise.
        scale: s.
        dropout: share of the rank-wide activations that is set to zero in training mode.
        start: A0 and B0, not trained; the branch is s · (B A - B0 A0) x then.

    Attributes:
        mask_BR: multiplies the rank-wide activations of each sample in training mode; None: not.
            Of an input without a sample in each row (a time embedding of tokens) the first row
            of the mask counts for all.
    """

    down: Tensor
    up: Tensor
    start_down: Tensor
    start_up: Tensor

    def __init__(
        self,
        base: nn.Module,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
        dropout: float = 0.0,
        *,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(base)
        self.hold("down", down_RI)
        self.hold("up", up_OR)
        self.has_start = start is not None
        if start is not None:
            self.hold("start_down", start[0])
            self.hold("start_up", start[1])
        self.scale = scale
        self.dropout = dropout
        self.mask_BR: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the branch computes in the dtype of x."""
        x_NI = x.reshape(-1, x.shape[-1])
        factor = self.scale * self.strength
        if factor == 0.0:
            return _unflatten(self.base(x_NI), x)
        down_RI, up_OR = self._factors(x.dtype)
        low_NR = F.linear(x_NI, down_RI)
        low_NR = F.dropout(low_NR, self.dropout, self.training)
        if self.mask_BR is not None and self.training:
            low_NR = _masked(low_NR, self.mask_BR, x)
        branch_NO = _Branch.apply(low_NR, up_OR, factor)  # type: ignore[no-untyped-call]
        low_NR, up_OR = low_NR.detach(), up_OR.detach()
        out_NO: Tensor = _Add.apply(self.base(x_NI), branch_NO, low_NR, up_OR, factor)  # type: ignore[no-untyped-call]
        return _unflatten(out_NO, x)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return down and up; with a start [A; A0] and [B, -B0]."""
        down_RI, up_OR = self.down.to(dtype), self.up.to(dtype)
        if not self.has_start:
            return down_RI, up_OR
        start_down, start_up = self.start_down.to(dtype), self.start_up.to(dtype)
        return torch.cat((down_RI, start_down)), torch.cat((up_OR, -start_up), dim=1)

    def extra_repr(self) -> str:
        """Name the rank and scale where the module is printed."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}, strength={self.strength:g}"


class _Branch(torch.autograd.Function):
    """The low-rank product f · low @ upᵀ for autograd alone: its value is never formed.

    All that backward needs is saved here, before the base layer runs. A checkpointed block is
    recomputed up to the last tensor saved; were that saved after the base layer, the matrix
    product of the block's last layer would be recomputed for nothing.
    """

    @staticmethod
    def forward(ctx: Any, low_NR: Tensor, up_OR: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(low_NR, up_OR)
        ctx.factor = factor
        return low_NR.new_empty(1).expand(low_NR.shape[0], up_OR.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        low_NR, up_OR = ctx.saved_tensors
        need_low, need_up, _ = ctx.needs_input_grad
        grad_low_NR = (grad_NO @ up_OR).mul_(ctx.factor) if need_low else None
        grad_up_OR = (grad_NO.t() @ low_NR).mul_(ctx.factor) if need_up else None
        return grad_low_NR, grad_up_OR, None


class _Add(torch.autograd.Function):
    """Adds the product to the base's output, in place where autograd allows it.

    Saves nothing: the gradient of both summands is the gradient of the sum. An output that is a
    view made by another autograd function (ZeRO-3's hooks) must not be changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, out_NO: Tensor, branch_NO: Tensor, low_NR: Tensor, up_OR: Tensor, factor: float
    ) -> Tensor:
        low_NR, up_RO = low_NR.to(out_NO.dtype), up_OR.to(out_NO.dtype).t()
        # A compiler plans memory itself, and cannot ask whether a tensor is a view.
        if torch.compiler.is_compiling() or out_NO._is_view():
            return torch.addmm(out_NO, low_NR, up_RO, alpha=factor)
        ctx.mark_dirty(out_NO)
        return out_NO.addmm_(low_NR, up_RO, alpha=factor)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return grad_NO, grad_NO, None, None, None


def _unflatten(out_NO: Tensor, like: Tensor) -> Tensor:
    return out_NO if like.dim() == 2 else out_NO.view(*like.shape[:-1], -1)


def _masked(low_NR: Tensor, mask_BR: Tensor, x: Tensor) -> Tensor:
    batch = mask_BR.shape[0]
    if x.shape[0] != batch:
        mask_BR = mask_BR[:1]
    by_sample = low_NR.view(mask_BR.shape[0], -1, low_NR.shape[1])
    return (by_sample * mask_BR.to(low_NR.dtype).unsqueeze(1)).view_as(low_NR)


def update_norm(down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """Return |scale| · ‖up @ down‖, float64, shape (), from two R x R products.

    ‖B A‖² = trace((BᵀB)(AAᵀ)); in float64, because the products' errors are squared.
    """
    up, down = up_OR.double(), down_RI.double()
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return abs(scale) * squared.sqrt()
