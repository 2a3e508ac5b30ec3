"""A linear layer with a low-rank branch beside it.

LoRA, Hu et al., arXiv:2106.09685: y = W x + b + s · B (A x), with A (R, I), B (O, R).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BASE = "base."


class LoRALinear(nn.Module):
    """Adds s · B (A x) to the output of `base`.

    `down` and `up` are parameters of this very module, so that whatever gathers or streams the
    parameters of a module around its forward (ZeRO-3) finds them. Given as plain tensors they
    become buffers: not trained, not in the state dict. In the state dict the base's tensors keep
    the names they had before it was wrapped.

    Autograd keeps the input, the rank-wide activations and both factors in the compute dtype, and
    no second tensor of the output's size exists.
    """

    down: Tensor
    up: Tensor

    def __init__(
        self, base: nn.Module, down_RI: Tensor, up_OR: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base = base
        for name, factor in (("down", down_RI), ("up", up_OR)):
            if isinstance(factor, nn.Parameter):
                self.register_parameter(name, factor)
            else:
                self.register_buffer(name, factor, persistent=False)
        self.scale = scale
        self.strength = 1.0
        self.dropout = dropout
        self.register_state_dict_post_hook(_hide_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_show_base)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the branch computes in the dtype of x."""
        x_NI = x.reshape(-1, x.shape[-1])
        factor = self.scale * self.strength
        if factor == 0.0:
            return _unflatten(self.base(x_NI), x)
        low_NR = F.linear(x_NI, self.down.to(x.dtype))
        low_NR = F.dropout(low_NR, self.dropout, self.training)
        up_OR = self.up.to(x.dtype)
        branch_NO = _Branch.apply(low_NR, up_OR, factor)  # type: ignore[no-untyped-call]
        low_NR, up_OR = low_NR.detach(), up_OR.detach()
        out_NO: Tensor = _Add.apply(self.base(x_NI), branch_NO, low_NR, up_OR, factor)  # type: ignore[no-untyped-call]
        return _unflatten(out_NO, x)

    @property
    def weight(self) -> Tensor:
        """The base's weight, so that it can be addressed by the name it had."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """I."""
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """O."""
        return self.base.out_features  # type: ignore[return-value]

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


def _hide_base(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    _rename(state, prefix + _BASE, prefix)


def _show_base(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    own = {prefix + name for name in module._parameters}
    for name in [n for n in state if n.startswith(prefix) and n not in own]:
        state[prefix + _BASE + name.removeprefix(prefix)] = state.pop(name)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [n for n in state if n.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
