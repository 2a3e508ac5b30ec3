"""A linear layer with a product of small tensors beside it, which is formed anew in backward.

Shape letters: N rows (tokens of all samples), I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear

Tensors = tuple[Tensor, ...]


class Product(Protocol):
    """x · ΔWᵀ for a ΔW that a few small tensors stand for. It keeps nothing."""

    def add_(self, out_NO: Tensor, x_NI: Tensor, tensors: Tensors, factor: float) -> Tensor:
        """Add factor · x ΔWᵀ to `out_NO` in place, and return it."""
        ...

    def gradients(
        self, grad_NO: Tensor, x_NI: Tensor, tensors: Tensors, factor: float
    ) -> tuple[Tensor, Tensors]:
        """Return the gradients of x and of the tensors for that of the product."""
        ...


class BranchLinear(AdapterLinear):
    """Adds factor · x ΔWᵀ to the output of `base`.

    Autograd keeps the input and the small tensors in the compute dtype. ΔW, or what the product
    makes on its way, exists for the time of one product only, and once more in backward.

    Args:
        base: the linear layer.
        tensors: by the name that they get here; each trained if it is a parameter.
        product: how they act on the input.
        scale: of the product.
    """

    def __init__(
        self, base: nn.Module, tensors: Mapping[str, Tensor], product: Product, scale: float
    ) -> None:
        super().__init__(base)
        for name, tensor in tensors.items():
            self.hold(name, tensor)
        self.names = tuple(tensors)
        self.product = product
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the branch computes in the dtype of x."""
        x_NI = x.reshape(-1, x.shape[-1])
        factor = self.scale * self.strength
        if factor == 0.0:
            return _unflatten(self.base(x_NI), x)
        tensors = tuple(getattr(self, name).to(x.dtype) for name in self.names)
        branch_NO = _Branch.apply(self.product, factor, self.out_features, x_NI, *tensors)  # type: ignore[no-untyped-call]
        fixed = tuple(tensor.detach() for tensor in (x_NI, *tensors))
        out_NO: Tensor = _Add.apply(self.base(x_NI), branch_NO, self.product, factor, *fixed)  # type: ignore[no-untyped-call]
        return _unflatten(out_NO, x)

    def extra_repr(self) -> str:
        """Name sizes and scale where the module is printed."""
        sizes = ", ".join(f"{name}={tuple(getattr(self, name).shape)}" for name in self.names)
        return f"{sizes}, scale={self.scale:g}, strength={self.strength:g}"


class _Branch(torch.autograd.Function):
    """The product for autograd alone: its value is never formed.

    What backward needs is saved here, before the base layer runs, so that the recomputation of a
    checkpointed block ends before the block's last product.
    """

    @staticmethod
    def forward(
        ctx: Any, product: Product, factor: float, outputs: int, x_NI: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_NI, *tensors)
        ctx.product, ctx.factor = product, factor
        return x_NI.new_empty(1).expand(x_NI.shape[0], outputs)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *tensors = ctx.saved_tensors
        grad_x_NI, grads = ctx.product.gradients(grad_NO, x_NI, tuple(tensors), ctx.factor)
        return None, None, None, grad_x_NI, *grads


class _Add(torch.autograd.Function):
    """Adds the product to the base's output, in place where autograd allows it; saves nothing.

    An output that is a view made by another autograd function (ZeRO-3's hooks) must not be changed
    in place, and a compiler, which plans memory itself, cannot ask whether a tensor is a view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out_NO: Tensor,
        branch_NO: Tensor,
        product: Product,
        factor: float,
        x_NI: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        if torch.compiler.is_compiling() or out_NO._is_view():
            out_NO = out_NO.clone()
        else:
            ctx.mark_dirty(out_NO)
        return product.add_(out_NO, x_NI, tensors, factor)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        return grad_NO, grad_NO, *(None,) * (len(ctx.needs_input_grad) - 2)


def _unflatten(out_NO: Tensor, like: Tensor) -> Tensor:
    return out_NO if like.dim() == 2 else out_NO.view(*like.shape[:-1], -1)
