"""The two products a frozen fp8 layer needs: its output, and the gradient of its input.

Shape letters: N rows (tokens of all samples), I input width, O output width, K contracted width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.quant.fp8 import dequantise

MULTIPLE = 16
"""Widths of an fp8 product must be multiples of this (`torch._scaled_mm`)."""
MIN_CAPABILITY = (8, 9)
"""Compute capability from which NVIDIA GPUs multiply in fp8: Ada (RTX 40), Hopper and newer."""
_E4M3 = torch.float8_e4m3fn


class Products(Protocol):
    """How a layer multiplies with its fp8 weight; `scale` as in `QuantisedWeight`."""

    def output(
        self, x_NI: Tensor, values_OI: Tensor, scale: Tensor | None, bias_O: Tensor | None
    ) -> Tensor:
        """Return x · Wᵀ + bias, (N, O) in the dtype of x."""
        ...

    def input_gradient(self, grad_NO: Tensor, values_OI: Tensor, scale: Tensor | None) -> Tensor:
        """Return grad · W, (N, I) in the dtype of the gradient."""
        ...


class DequantisedProducts:
    """Turn the weight into the activations' dtype for the time of one product."""

    def output(
        self, x_NI: Tensor, values_OI: Tensor, scale: Tensor | None, bias_O: Tensor | None
    ) -> Tensor:
        """Return x · Wᵀ + bias, (N, O) in the dtype of x."""
        return F.linear(x_NI, dequantise(values_OI, scale, x_NI.dtype), bias_O)

    def input_gradient(self, grad_NO: Tensor, values_OI: Tensor, scale: Tensor | None) -> Tensor:
        """Return grad · W, (N, I) in the dtype of the gradient."""
        return grad_NO @ dequantise(values_OI, scale, grad_NO.dtype)


class Fp8Products:
    """Multiply fp8 with fp8, summed in float32: `torch._scaled_mm`.

    Activations and gradients are rounded to e4m3 with a scale a row (a token). That scale is a
    power of two: multiplying with it is exact in bfloat16, and costs a float format nothing but
    one doubling of range. The weight's own scales must be (1, 1) or (O, 1): they are applied to the
    columns of the output, and to the gradient before it is rounded.
    """

    def output(
        self, x_NI: Tensor, values_OI: Tensor, scale: Tensor | None, bias_O: Tensor | None
    ) -> Tensor:
        """Return x · Wᵀ + bias, (N, O) in the dtype of x."""
        if scale is None:
            scale = x_NI.new_ones(1, 1, dtype=torch.float32)
        columns_1O = scale.float().expand(len(values_OI), 1).t().contiguous()
        rounded_NI, rows_N1 = _round_rows(x_NI)
        return torch._scaled_mm(
            rounded_NI,
            values_OI.t(),
            rows_N1,
            columns_1O,
            bias=bias_O,
            out_dtype=x_NI.dtype,
            use_fast_accum=True,
        )

    def input_gradient(self, grad_NO: Tensor, values_OI: Tensor, scale: Tensor | None) -> Tensor:
        """Return grad · W, (N, I) in the dtype of the gradient."""
        if scale is not None:
            grad_NO = grad_NO * scale.to(grad_NO.dtype).view(1, -1)
        rounded_NO, rows_N1 = _round_rows(grad_NO)
        # The second factor must lie column by column: a copy of one byte an element.
        columns_OI = values_OI.t().contiguous().t()
        ones_1I = rows_N1.new_ones(1, values_OI.shape[1])
        return torch._scaled_mm(rounded_NO, columns_OI, rows_N1, ones_1I, out_dtype=grad_NO.dtype)


def fp8_products_problem(device: torch.device) -> str | None:
    """Return why `device` cannot multiply in fp8; None where it can.

    A GPU is judged by its compute capability, so that asking takes none of its memory; a CPU by one
    small product, because only some builds of torch have it.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= MIN_CAPABILITY:
            return None
        name = torch.cuda.get_device_name(device)
        found, needed = (".".join(map(str, c)) for c in (capability, MIN_CAPABILITY))
        return f"{name} has compute capability {found}; fp8 products need {needed}"
    x_NI = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        Fp8Products().output(x_NI, x_NI.to(_E4M3), None, None)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return f"torch {torch.__version__} cannot multiply fp8 on {device.type}: {reason}"
    return None


def _round_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in e4m3, row by row on a scale of its own, and the scales, (N, 1) float32."""
    largest_N1 = x_NK.abs().amax(1, keepdim=True).float().clamp(min=1e-12)
    exponent_N1 = torch.floor(torch.log2(torch.finfo(_E4M3).max / largest_N1))
    factor_N1 = torch.exp2(exponent_N1).to(x_NK.dtype)
    # Kernels take the first factor row by row only; a gradient may lie in any order.
    return (x_NK * factor_N1).to(_E4M3).contiguous(), factor_N1.float().reciprocal()
