"""Schedule-free AdamW (Defazio et al., arXiv:2405.15682), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import Decay
from trainer.optimizers.packages import optimizer_class


class ScheduleFree(OptimizerFactory):
    """Averages the weights instead of lowering the learning rate.

    Gradients are taken at y = (1 - β₁)·z + β₁·x between the steps' own weights z and their average
    x. Samples, validation and outputs have x; checkpoints keep y, so that training goes on exactly.
    """

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("z", "exp_avg_sq")

    class Config(Options):
        """Options of `optimizer.kind = "schedulefree"`."""

        betas: tuple[Annotated[float, Field(gt=0, lt=1)], Decay] = (0.9, 0.999)
        """How near to the average gradients are taken, and decay of their squares' mean."""
        eps: float = Field(1e-8, gt=0)
        """Added to the root of the second moment."""
        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times the learning rate."""
        r: float = Field(0.0, ge=0)
        """Step t counts as t^r in the average: larger values forget the start faster."""
        weight_lr_power: float = Field(2.0, ge=0)
        """Steps count as the largest learning rate so far to this power, so that a warm-up counts
        less."""

    def __init__(self, config: ScheduleFree.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer, ready to train.

        Raises:
            ConfigError: pytorch-optimizer is not installed.
        """
        config = self.config
        optimizer = optimizer_class("schedulefree", "ScheduleFreeAdamW")(
            [dict(group) for group in parameters],
            lr=lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            r=config.r,
            weight_lr_power=config.weight_lr_power,
        )
        return cast("torch.optim.Optimizer", optimizer)
