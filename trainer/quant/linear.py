"""A frozen linear layer whose weight is held in fp8.

Shape letters: N rows (tokens of all samples), I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.quant.fp8 import QuantisedWeight, dequantise
from trainer.quant.products import DequantisedProducts, Products


class Fp8Linear(nn.Module):
    """y = x · (values · scale)ᵀ + bias, with gradients for x (and a trained bias) only.

    Weight and scales are frozen parameters under the names `weight` and `weight_scale`, so that
    whatever moves, streams or shares a model's parameters takes them along. Nothing of the weight's
    size is kept for the backward: it turns the weight back into floats once more.

    Attributes:
        format: the fp8 dtype of the numbers, also where `weight` holds them as bytes.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter | None

    def __init__(
        self, weight: QuantisedWeight, bias_O: nn.Parameter | None, products: Products | None = None
    ) -> None:
        """Hold a quantised weight.

        Args:
            weight: the numbers and their scales.
            bias_O: of the layer, in the dtype of its activations.
            products: how to multiply; None: with the weight turned into the activations' dtype.
        """
        super().__init__()
        self.out_features, self.in_features = weight.values_OI.shape
        self.format = weight.values_OI.dtype
        self.weight = nn.Parameter(weight.values_OI, requires_grad=False)
        scale = weight.scale
        self.register_parameter(
            "weight_scale", None if scale is None else nn.Parameter(scale, requires_grad=False)
        )
        self.register_parameter("bias", bias_O)
        self.products = products or DequantisedProducts()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in the dtype of x."""
        x_NI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weight, scale, products = self.weight, self.weight_scale, self.products
        # The parameter itself is saved, not a view of it: ZeRO-3 takes its memory away in between.
        route_NO = _route(x_NI, weight, scale, products, self.format)
        values_OI = _numbers(weight, self.format)
        out_NO = _value(route_NO, x_NI.detach(), values_OI, scale, self.bias, products)
        return out_NO if x.dim() == 2 else out_NO.view(*x.shape[:-1], -1)

    def hold_bytes(self) -> None:
        """Let `weight` be uint8 (O, I) from now on, the same bytes: what sends tensors between
        processes (gloo, and so ZeRO-3 on it) does not know fp8."""
        self.weight = nn.Parameter(self.weight.detach().view(torch.uint8), requires_grad=False)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight as floats, (O, I)."""
        return dequantise(_numbers(self.weight, self.format), self.weight_scale, dtype)

    def extra_repr(self) -> str:
        """Name sizes, format and scales where the module is printed."""
        scales = "no scales" if self.weight_scale is None else tuple(self.weight_scale.shape)
        kind = str(self.format).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}, {scales}"


def _numbers(weight_OI: Tensor, kind: torch.dtype) -> Tensor:
    """Return the fp8 numbers, whether they are held as such or as bytes; no copy."""
    return weight_OI if weight_OI.dtype == kind else weight_OI.view(kind)


class _Route(torch.autograd.Function):
    """The way of the gradient past the product: a stand-in for its value, which is never formed.

    What backward needs is saved here, before the product. A checkpointed block is recomputed up to
    the last tensor saved; were it saved with the product, the block's last product would be
    recomputed for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        scale: Tensor | None,
        products: Products,
        kind: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, scale)
        ctx.products, ctx.kind = products, kind
        return x_NI.new_empty(1).expand(x_NI.shape[0], weight_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        weight_OI, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        values_OI = _numbers(weight_OI, ctx.kind)
        gradient_NI = ctx.products.input_gradient(grad_NO, values_OI, scale)
        return gradient_NI, None, None, None, None


class _Value(torch.autograd.Function):
    """The product itself; its gradient goes to the stand-in."""

    @staticmethod
    def forward(
        ctx: Any,
        route_NO: Tensor,
        x_NI: Tensor,
        values_OI: Tensor,
        scale: Tensor | None,
        bias_O: Tensor | None,
        products: Products,
    ) -> Tensor:
        return products.output(x_NI, values_OI, scale, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None, None, Tensor | None, None]:
        grad_O = grad_NO.sum(0) if ctx.needs_input_grad[4] else None
        return grad_NO, None, None, None, grad_O, None


_route = cast("Callable[..., Tensor]", _Route.apply)
_value = cast("Callable[..., Tensor]", _Value.apply)
