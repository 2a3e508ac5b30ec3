"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamWOptions(Options):
    """Options both AdamW kinds share."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares, each in [0, 1)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Share of each weight that is taken away per step, times the learning rate."""


class AdamW(OptimizerFactory):
    """torch's AdamW; its state is one tensor a moment, of the parameter's shape."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    class Config(AdamWOptions):
        """Options of `optimizer.kind = "adamw"`."""

        fused: bool | None = None
        """Update all weights in one kernel, without temporary copies; empty: on CUDA."""

    def __init__(self, config: AdamW.Config, build: BuildContext) -> None:
        self.config = config
        self.fused = build.device.type == "cuda" if config.fused is None else config.fused

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(
            [dict(group) for group in parameters],
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            fused=self.fused,
        )
