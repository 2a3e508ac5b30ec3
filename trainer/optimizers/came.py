"""CAME: Adafactor with a mean, weighed by confidence (arXiv:2307.02047), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import Decay
from trainer.optimizers.packages import optimizer_class


class CAME(OptimizerFactory):
    """About half of AdamW's state: a mean of updates, and sums over rows and columns."""

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(Options):
        """Options of `optimizer.kind = "came"`."""

        betas: tuple[Decay, Decay, Decay] = (0.9, 0.999, 0.9999)
        """Decay of the means of updates, of squares of gradients and of squared deviations."""
        eps: tuple[float, float] = (1e-30, 1e-16)
        """Added to the squares of gradients and to the squared deviations."""
        clip_threshold: float = Field(1.0, gt=0)
        """Largest root mean square of a matrix's update, before the learning rate."""
        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times the learning rate."""

    def __init__(self, config: CAME.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: pytorch-optimizer is not installed.
        """
        config = self.config
        optimizer = optimizer_class("came", "CAME")(
            [dict(group) for group in parameters],
            lr=lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            clip_threshold=config.clip_threshold,
            eps1=config.eps[0],
            eps2=config.eps[1],
        )
        return cast("torch.optim.Optimizer", optimizer)
