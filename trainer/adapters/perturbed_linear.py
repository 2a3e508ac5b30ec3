"""A LoRA layer whose whole weight is disturbed by noise while it trains, for `ggpo.py`.

Shape letters: R rank, I input width, O output width, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.lora_linear import LoRALinear
from trainer.core.rng import derive_seed

_ROWS = 1024
"""Rows of a weight that are float32 at a time."""


class NoiseState:
    """What all layers of an adapter share in a step.

    Attributes:
        step: updates of the weights made so far.
        seed: of the noise of this microbatch; None outside of a training step.
        measures: norms are taken anew in this step.
    """

    def __init__(self, sigma: float, beta: float) -> None:
        self.sigma = sigma
        self.beta = beta
        self.step = 0
        self.seed: int | None = None
        self.measures = False


class PerturbedLinear(LoRALinear):
    """Adds s · B (A x) to the output of `base`, and E x in training.

    The rows of E are normal noise of deviation (σ · ‖row of W + s B A‖ + β · ‖row of its
    gradient‖) / √O. E is a function of the microbatch's seed and of the layer's name: all forwards
    of a microbatch, and what the backward recomputes of them, see the same disturbed weights.

    Attributes:
        weight_norms_O: row norms when they were measured last, float32.
        gradient_norms_O: likewise.
    """

    def __init__(
        self,
        base: nn.Module,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
        dropout: float,
        *,
        name: str,
        noise: NoiseState,
    ) -> None:
        super().__init__(base, down_RI, up_OR, scale, dropout)
        self.weight_norms_O: Tensor
        self.gradient_norms_O: Tensor
        for norms in ("weight_norms_O", "gradient_norms_O"):
            self.hold(norms, torch.zeros(self.out_features, device=up_OR.device))
        self._name = name
        self._noise = noise
        self._measured_at = -1

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        out = super().forward(x)
        noise = self._noise
        if not self.training or noise.seed is None or self.strength == 0.0:
            return out
        if noise.measures and self._measured_at != noise.step:
            with torch.no_grad():
                self.weight_norms_O.copy_(self._row_norms())
            self._measured_at = noise.step
        spread_O = noise.sigma * self.weight_norms_O + noise.beta * self.gradient_norms_O
        spread_O = spread_O / math.sqrt(self.out_features)
        seed = derive_seed(noise.seed, self._name)
        return out + _disturbed(x.reshape(-1, x.shape[-1]), spread_O, seed).view_as(out)

    def _row_norms(self) -> Tensor:
        """Return the norms of the rows of W + s · B A, (O,), in float32."""
        weight_OI = _whole_weight(self.base)
        norms = [
            (rows.float() + self.scale * (up.float() @ self.down.float())).norm(dim=1)
            for rows, up in zip(
                torch.split(weight_OI, _ROWS), torch.split(self.up, _ROWS), strict=True
            )
        ]
        return torch.cat(norms)


def product_row_norms(
    up_OR: Tensor, down_RI: Tensor, up_gradient_OR: Tensor, down_gradient_RI: Tensor, scale: float
) -> Tensor:
    """Return the row norms of s · (B ∂A + ∂B A), (O,) float32, without forming that (O, I) matrix.

    It is what a small step along the factors' gradients changes of the weight.
    """
    left = torch.cat((up_OR, up_gradient_OR), dim=1).double()
    right = torch.cat((down_gradient_RI, down_RI)).double()
    squared_O = ((left @ (right @ right.T)) * left).sum(dim=1)
    return (scale * squared_O.clamp(min=0).sqrt()).float()


def _whole_weight(layer: nn.Module) -> Tensor:
    while isinstance(layer, AdapterLinear):
        layer = layer.base
    dequantised = getattr(layer, "dequantised", None)
    weight = layer.weight if dequantised is None else dequantised(torch.bfloat16)
    return cast(Tensor, weight)


class _Disturbed(torch.autograd.Function):
    """x Eᵀ. E, as large as the weight, is not kept but drawn again in the backward."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, spread_O: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(spread_O)
        ctx.seed, ctx.inputs = seed, x_NI.shape[1]
        return x_NI @ _noise(spread_O, x_NI.shape[1], x_NI.dtype, seed).T

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None]:
        (spread_O,) = ctx.saved_tensors
        return grad_NO @ _noise(spread_O, ctx.inputs, grad_NO.dtype, ctx.seed), None, None


def _noise(spread_O: Tensor, inputs: int, dtype: torch.dtype, seed: int) -> Tensor:
    random = torch.Generator(spread_O.device).manual_seed(seed)
    size = (spread_O.shape[0], inputs)
    drawn = torch.randn(size, generator=random, device=spread_O.device, dtype=dtype)
    return drawn.mul_(spread_O[:, None].to(dtype))


_disturbed = cast("Callable[..., Tensor]", _Disturbed.apply)
