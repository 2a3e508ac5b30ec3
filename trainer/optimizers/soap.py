"""SOAP: Adam in the eigenbasis of Shampoo (Vyas et al., arXiv:2409.11321), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import Decay
from trainer.optimizers.packages import optimizer_class


class SOAP(OptimizerFactory):
    """Rotates gradients by their own statistics before Adam; the first step changes nothing."""

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(Options):
        """Options of `optimizer.kind = "soap"`."""

        betas: tuple[Decay, Decay] = (0.95, 0.95)
        """Decay of the running mean of gradients and of their squares, each in [0, 1)."""
        shampoo_beta: float | None = Field(None, ge=0, lt=1)
        """Decay of the statistics that gradients are rotated by; empty: the second of `betas`."""
        eps: float = Field(1e-8, gt=0)
        """Added to the root of the second moment."""
        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times the learning rate."""
        precondition_frequency: int = Field(10, ge=1)
        """Steps between two rotations: fewer is slower and nearer to Shampoo."""
        max_precondition_dim: int = Field(512, ge=1)
        """Sides of a matrix up to this length are rotated; each takes two squares of floats. For a
        LoRA that is the side of the rank."""

    def __init__(self, config: SOAP.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: pytorch-optimizer is not installed.
        """
        config = self.config
        optimizer = optimizer_class("soap", "SOAP")(
            [dict(group) for group in parameters],
            lr=lr,
            betas=config.betas,
            shampoo_beta=config.shampoo_beta,
            weight_decay=config.weight_decay,
            precondition_frequency=config.precondition_frequency,
            max_precondition_dim=config.max_precondition_dim,
            eps=config.eps,
        )
        return cast("torch.optim.Optimizer", optimizer)
