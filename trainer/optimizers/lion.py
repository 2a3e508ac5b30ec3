"""Lion: the sign of a mean of gradients (Chen et al., arXiv:2302.06675), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import Decay
from trainer.optimizers.packages import optimizer_class


class LionOptions(Options):
    """Options both Lion kinds share."""

    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Share of the mean in the update, and decay of the mean, each in [0, 1)."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of each weight that is taken away per step, times the learning rate."""


class Lion(OptimizerFactory):
    """w ← w - lr · (sign(β₁·m + (1 - β₁)·g) + λ·w); m ← β₂·m + (1 - β₂)·g."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg",)

    class Config(LionOptions):
        """Options of `optimizer.kind = "lion"`."""

    def __init__(self, config: Lion.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: pytorch-optimizer is not installed.
        """
        optimizer = optimizer_class("lion", "Lion")(
            [dict(group) for group in parameters],
            lr=lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
        )
        return cast("torch.optim.Optimizer", optimizer)
