"""Prodigy: Adam that estimates its step size (arXiv:2306.06101), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.errors import ConfigError
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import AdamWOptions
from trainer.optimizers.packages import optimizer_class


class Prodigy(OptimizerFactory):
    """Its step is d · lr, with d an estimate of the way from the first weights to the best ones.

    d is one number for all weights, from sums over all of them.
    """

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "s", "p0")

    class Config(AdamWOptions):
        """Options of `optimizer.kind = "prodigy"`."""

        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times d and the learning rate."""
        beta3: float | None = Field(None, ge=0, lt=1)
        """Decay of the sums that d comes from; empty: the root of the second of `betas`."""
        d0: float = Field(1e-6, gt=0)
        """First value of d."""
        d_coef: float = Field(1.0, gt=0)
        """Factor on the estimate of d: the paper's way to larger or smaller steps."""
        growth_rate: float | None = Field(None, gt=1)
        """d grows by this factor a step at most; empty: without bound."""
        bias_correction: bool = False
        """Correct Adam's moments for their start from 0."""
        safeguard_warmup: bool = False
        """Leave the learning rate out of the sums, so that a warm-up does not raise d."""

    def __init__(self, config: Prodigy.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: pytorch-optimizer is not installed, or layers have learning rates of their
                own, which it would ignore.
        """
        groups = [dict(group) for group in parameters]
        if len({group.get("lr_scale", 1.0) for group in groups}) > 1:
            raise ConfigError(
                "Prodigy has one step size for all layers, and these have learning rates of their "
                "own",
                hint="leave out what scales the rate of some layers (loraplus_lr_ratio, rules with "
                "a learning rate), or set optimizer.kind = 'adamw'",
            )
        config = self.config
        growth = {} if config.growth_rate is None else {"growth_rate": config.growth_rate}
        optimizer = optimizer_class("prodigy", "Prodigy")(
            groups,
            lr=lr,
            betas=config.betas,
            beta3=config.beta3,
            d0=config.d0,
            d_coef=config.d_coef,
            weight_decay=config.weight_decay,
            bias_correction=config.bias_correction,
            safeguard_warmup=config.safeguard_warmup,
            eps=config.eps,
            **growth,
        )
        return cast("torch.optim.Optimizer", optimizer)
