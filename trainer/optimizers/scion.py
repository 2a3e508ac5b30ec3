"""Scion: steps of a fixed size in each matrix's norm (arXiv:2502.07529), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.packages import optimizer_class


class Scion(OptimizerFactory):
    """Matrices move in the spectral norm, by √(rows / columns); vectors by their root mean square.

    The unconstrained form: weights may grow without bound but for `weight_decay`.
    """

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ("d",)

    class Config(Options):
        """Options of `optimizer.kind = "scion"`."""

        momentum: float = Field(0.1, gt=0, le=1)
        """Share of the new gradient in the mean of gradients (0.1 keeps 0.9 of the old one)."""
        scale: float = Field(1.0, gt=0)
        """Factor on the size of a step."""
        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times the learning rate."""

    def __init__(self, config: Scion.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: pytorch-optimizer is not installed.
        """
        config = self.config
        optimizer = optimizer_class("scion", "SCION")(
            [dict(group) for group in parameters],
            lr=lr,
            momentum=config.momentum,
            scale=config.scale,
            weight_decay=config.weight_decay,
        )
        return cast("torch.optim.Optimizer", optimizer)
