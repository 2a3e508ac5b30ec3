"""Max-norm: no layer's update grows beyond a bound.

As `scale_weight_norms` of kohya's sd-scripts: where ‖ΔW‖ = |s| ‖B A‖ is larger than c, both factors
are multiplied by √(c / ‖ΔW‖), so that the update's Frobenius norm is c.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trainer.adapters.lora_linear import LoRALinear, update_norm
from trainer.core.seams import Technique


class MaxNorm(Technique):
    """Bounds the updates after each step.

    It changes the trained tensors themselves, so they must be what the optimizer steps on: float32
    and whole. ZeRO steps on copies of its own (`adapter_rules` refuses it).
    """

    def __init__(self, layers: Iterable[LoRALinear], limit: float) -> None:
        self._layers = tuple(layers)
        self._limit = limit

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Scale down what is too large; what is not keeps its bits."""
        for layer in self._layers:
            norm = update_norm(layer.down, layer.up, layer.scale)
            factor = (self._limit / norm.clamp(min=self._limit)).sqrt().to(layer.down.dtype)
            layer.down.mul_(factor)
            layer.up.mul_(factor)
