"""DoRA: the direction of each weight row is updated by a LoRA, its length is a number of its own.

W' = m ⊙ (W + s·BA) / ‖W + s·BA‖, the norm row by row (an output each) and, as the paper's section
4.3 proposes, a constant for the gradient. Liu et al., arXiv:2402.09353. A strength t between none
and all gives W + t·(W' − W), as in ComfyUI; PEFT and LyCORIS scale s or the lengths instead.

Shape letters: N rows (tokens of all samples), R rank, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import Update
from trainer.adapters.lora_linear import update_norm
from trainer.adapters.wrapping import base_weight
from trainer.contract.errors import ModelFileError

_SHORTEST = 1e-12
"""Rows shorter than this count as so long."""
_ROWS = 512
"""Tokens whose float32 products exist at a time in backward."""
_PROBES = 256
"""Inputs that an adapted layer is asked for at a time."""


class DoRALinear(AdapterLinear):
    """Rescales the output of `base` and of a low-rank branch, output by output.

    y = g ⊙ (base(x) − b) + b + t·c·s ⊙ B(Ax), with c = m / ‖W + s·BA‖ and g = 1 + t·(c − 1).

    W + s·BA is never formed. The squares of its norms are ‖W‖² + 2s·Σ (B ⊙ WAᵀ) + s²·Σ (B ⊙ BAAᵀ),
    summed along each row: ‖W‖² is computed once, and WAᵀ and b are what `base` answers to the rows
    of A and to zeros. So whatever makes the weight available in the base's forward (fp8, block
    swap, ZeRO-3, another adapter) serves this, too. Autograd keeps the input, the rank-wide
    activations, and the output, which most of what follows keeps anyway.

    Args:
        base: the linear layer.
        down_RI: A; trained if it is a parameter.
        up_OR: B; likewise.
        magnitude_O: m; likewise.
        scale: s.
        base_squares_O: ‖W‖²; None: it is computed on first use.

    Raises:
        ModelFileError: under it is an adapter whose update is another one for each sample.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor
    base_squares: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        down_RI: Tensor,
        up_OR: Tensor,
        magnitude_O: Tensor,
        scale: float,
        base_squares_O: Tensor | None = None,
    ) -> None:
        require_one_weight(base)
        super().__init__(base)
        self.hold("down", down_RI)
        self.hold("up", up_OR)
        self.hold("magnitude", magnitude_O)
        self.register_buffer("base_squares", base_squares_O, persistent=False)
        self.scale = scale
        self._seen = _below(base)
        self._renewed_squares = _uncompiled_renewal()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O); the branch computes in the dtype of x, norms in float32."""
        x_NI = x.reshape(-1, x.shape[-1])
        if self.strength == 0.0:
            out_NO: Tensor = self.base(x_NI)
            return out_NO.view(*x.shape[:-1], -1)
        low_NR = F.linear(x_NI, self.down.to(x.dtype))
        norm_O, bias_O = self._norm(x.dtype)
        # A view, also of two dimensions: nothing may change in place what backward reads.
        out_NO = _Rescaled.apply(  # type: ignore[no-untyped-call]
            self.base(x_NI),
            low_NR,
            self.up.to(x.dtype),
            self.magnitude,
            norm_O,
            bias_O,
            (self.scale, self.strength),
        )
        return out_NO.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return ‖W + s·BA‖ row by row and the bias, both (O,)."""
        wide = self.magnitude.dtype
        down_RI, up_OR = self.down.detach().to(wide), self.up.detach().to(wide)
        zeros_1I = down_RI.new_zeros(1, down_RI.shape[1])
        answers = self.base(torch.cat([down_RI, zeros_1I]).to(dtype)).to(wide)
        bias_O = answers[-1]
        across_OR = (answers[:-1] - bias_O).t()
        added_OR = 2 * self.scale * across_OR + self.scale**2 * (up_OR @ (down_RI @ down_RI.t()))
        squares_O = self._base_squares(up_OR.device) + (added_OR * up_OR).sum(1)
        return squares_O.clamp(min=_SHORTEST**2).sqrt(), bias_O

    def _base_squares(self, device: torch.device) -> Tensor:
        below = _below(self.base)
        if self.base_squares is None or below is None or below != self._seen:
            self._seen = below
            return self._renewed_squares(self, device)
        return self.base_squares

    def extra_repr(self) -> str:
        """Name the rank and scale where the module is printed."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}, strength={self.strength:g}"


def require_one_weight(base: nn.Module) -> None:
    """Refuse a layer that acts like no one weight, whose rows would have no one length.

    Raises:
        ModelFileError: such an adapter is on it.
    """
    while isinstance(base, AdapterLinear):
        if base.by_sample:
            raise ModelFileError(
                "a DoRA measures the weight that it is put on, and under it is a T-LoRA, which "
                "changes that weight with each timestep",
                hint="name the DoRA before the T-LoRA, or leave one of them out",
            )
        base = base.base


def squared_rows(base: nn.Module) -> Tensor:
    """Return the squared norm of each row of a linear layer's weight, (O,), float32.

    Of an fp8 layer's dequantised weight; with an adapter on it, of what the layer acts like.

    Raises:
        RuntimeError: the weight is streamed, and not here.
        ModelFileError: under it is an adapter whose update is another one for each sample.
    """
    require_one_weight(base)
    weight = _weight(base)
    if weight.device.type == "meta":
        raise RuntimeError("the weight of this layer is not here; stream its block first")
    if not isinstance(base, AdapterLinear):
        weight = base_weight(base)
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows_O: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
        return rows_O.square()
    dtype, inputs = weight.dtype if weight.itemsize > 1 else torch.bfloat16, base.in_features
    bias_O: Tensor = base(torch.zeros(1, inputs, dtype=dtype, device=weight.device))[0].float()
    squares_O = torch.zeros_like(bias_O)
    for start in range(0, inputs, _PROBES):
        asked = torch.arange(start, min(start + _PROBES, inputs), device=weight.device)
        columns = base(F.one_hot(asked, inputs).to(dtype)).float() - bias_O
        squares_O += columns.square_().sum(0)
    return squares_O


def _renew(layer: DoRALinear, device: torch.device) -> Tensor:
    squares_O = squared_rows(layer.base).to(device, layer.magnitude.dtype)
    layer.base_squares = squares_O
    return squares_O


@cache
def _uncompiled_renewal() -> Callable[[DoRALinear, torch.device], Tensor]:
    """Return what computes ‖W‖² anew, as a function that compiled blocks break off at: it is rare.

    Not made on import: that would load the compiler.
    """
    disable: Any = torch.compiler.disable
    return cast("Callable[[DoRALinear, torch.device], Tensor]", disable(_renew))


def _weight(base: nn.Module) -> Tensor:
    weight = base.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(base).__name__} has no weight tensor")
    return weight


def _below(base: nn.Module) -> tuple[tuple[int, float], ...] | None:
    """Return what tells one state of the adapters under a layer from another; None: they train."""
    found = []
    while isinstance(base, AdapterLinear):
        if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
            return None
        found.append((id(base), base.strength))
        base = base.base
    return tuple(found)


class _Rescaled(torch.autograd.Function):
    """g ⊙ (h − b) + b + t·c·s ⊙ low Bᵀ for the base's output h; norms are constants.

    In place of h where autograd allows it. Keeps its own output: the gradient of m needs
    v = h − b + s·low Bᵀ, and y − b = g ⊙ v − (1 − t)·s·low Bᵀ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out_NO: Tensor,
        low_NR: Tensor,
        up_OR: Tensor,
        magnitude_O: Tensor,
        norm_O: Tensor,
        bias_O: Tensor,
        scale_and_strength: tuple[float, float],
    ) -> Tensor:
        gain_O, factor_O1 = _factors(magnitude_O, norm_O, *scale_and_strength)
        branch_RO = (up_OR * factor_O1).to(out_NO.dtype).t()
        # A compiler plans memory itself, and cannot ask whether a tensor is a view.
        if torch.compiler.is_compiling() or out_NO._is_view():
            out_NO = out_NO.clone()
        else:
            ctx.mark_dirty(out_NO)
        out_NO.mul_(gain_O).add_((1 - gain_O) * bias_O).addmm_(low_NR, branch_RO)
        ctx.save_for_backward(out_NO, low_NR, up_OR, magnitude_O, norm_O, bias_O)
        ctx.scale, ctx.strength = scale_and_strength
        return out_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        out_NO, low_NR, up_OR, magnitude_O, norm_O, bias_O = ctx.saved_tensors
        gain_O, factor_O1 = _factors(magnitude_O, norm_O, ctx.scale, ctx.strength)
        need_out, need_low, need_up, need_magnitude, *_ = ctx.needs_input_grad
        grad_low_NR = grad_NO @ (up_OR * factor_O1).to(grad_NO.dtype) if need_low else None
        along_OR = (grad_NO.t() @ low_NR).to(norm_O.dtype)
        grad_up_OR = (along_OR * factor_O1).to(up_OR.dtype) if need_up else None
        grad_magnitude_O = None
        if need_magnitude:
            rest_O = (1 - ctx.strength) * ctx.scale * (along_OR * up_OR).sum(1)
            total_O = _along(grad_NO, out_NO, bias_O) + rest_O
            per_unit_O = total_O * ctx.strength / (gain_O * norm_O)
            grad_magnitude_O = torch.where(gain_O == 0, 0.0, per_unit_O).to(magnitude_O.dtype)
        # Not `grad * gain`, whose float32 result would be twice as large.
        grad_out_NO = grad_NO.clone().mul_(gain_O) if need_out else None
        return grad_out_NO, grad_low_NR, grad_up_OR, grad_magnitude_O, None, None, None


def _factors(
    magnitude_O: Tensor, norm_O: Tensor, scale: float, strength: float
) -> tuple[Tensor, Tensor]:
    ratio_O = magnitude_O / norm_O
    return 1 + strength * (ratio_O - 1), (strength * scale * ratio_O).unsqueeze(1)


def _along(grad_NO: Tensor, out_NO: Tensor, bias_O: Tensor) -> Tensor:
    """Return Σ grad ⊙ (out − bias) over the rows, in the bias's dtype, a few rows at a time."""
    rows = len(grad_NO) if torch.compiler.is_compiling() else _ROWS
    total_O = torch.zeros_like(bias_O)
    for grad, out in zip(torch.split(grad_NO, rows), torch.split(out_NO, rows), strict=True):
        total_O = total_O + (out - bias_O).mul_(grad).sum(0)
    return total_O


@dataclass(frozen=True, slots=True, eq=False)
class DoRAFactors(Update):
    """One linear layer's DoRA."""

    kind = "dora"
    precise = frozenset({"magnitude"})

    down_RI: Tensor
    up_OR: Tensor
    magnitude_O: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.down_RI.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I): shape of the weight that is adapted."""
        return self.up_OR.shape[0], self.down_RI.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return `down` (R, I), `up` (O, R) and `magnitude` (O,)."""
        return {"down": self.down_RI, "up": self.up_OR, "magnitude": self.magnitude_O}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DoRAFactors:
        """Return the same update of these tensors."""
        return DoRAFactors(tensors["down"], tensors["up"], tensors["magnitude"], self.alpha)

    def folded(self) -> DoRAFactors:
        """Return the same update with alpha = rank; the scale goes into the up factor."""
        if self.scale == 1.0:
            return self
        return replace(self, up_OR=self.up_OR.float() * self.scale, alpha=float(self.rank))

    def delta(self, strength: float = 1.0) -> NoReturn:
        """Refuse: what is added depends on the weight.

        Raises:
            ModelFileError: always.
        """
        raise ModelFileError(
            "what a DoRA adds depends on the weight that it is for, so it cannot be had alone",
            hint="merge it into its base model (menma merge), or use an adapter of another kind",
        )

    def beside(self, base: nn.Module, dtype: torch.dtype, device: torch.device) -> DoRALinear:
        """Return a layer that rescales `base` and a low-rank branch."""
        down, up = (factor.to(device, dtype) for factor in (self.down_RI, self.up_OR))
        magnitude = self.magnitude_O.to(device, torch.float32)
        is_here = _weight(base).device.type != "meta"
        squares = squared_rows(base).to(device, torch.float32) if is_here else None
        return DoRALinear(base, down, up, magnitude, self.scale, squares)

    def added_to(self, weight_OI: Tensor, strength: float = 1.0) -> Tensor:
        """Return W + strength · (W' − W) in float32 on the weight's device."""
        weight = weight_OI.float()
        down, up = (
            factor.to(weight.device, torch.float32) for factor in (self.down_RI, self.up_OR)
        )
        turned = torch.addmm(weight, up, down, alpha=self.scale)
        norm_O1 = turned.norm(dim=1, keepdim=True).clamp(min=_SHORTEST)
        magnitude_O1 = self.magnitude_O.to(weight.device, torch.float32).unsqueeze(1)
        return torch.lerp(weight, turned.mul_(magnitude_O1 / norm_O1), strength)

    def norm(self) -> float:
        """Return the Frobenius norm of s·BA alone: how far the directions are pushed."""
        return float(update_norm(self.down_RI, self.up_OR, self.scale))
