"""Adafactor: second moments as sums over rows and columns (arXiv:1804.04235), by transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory


class Adafactor(OptimizerFactory):
    """Next to no state: of a matrix it keeps one number a row and one a column.

    The learning rate is the run's own: the paper's relative step, which ignores it, is off.
    """

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(Options):
        """Options of `optimizer.kind = "adafactor"`."""

        eps: tuple[float, float] = (1e-30, 1e-3)
        """Added to the squares of gradients, and the smallest size of a weight that scales."""
        clip_threshold: float = Field(1.0, gt=0)
        """Largest root mean square of a matrix's update, before the learning rate."""
        decay_rate: float = Field(-0.8, lt=0)
        """Of the second moments: step t keeps 1 - t^decay_rate of them."""
        beta1: float | None = Field(None, ge=0, lt=1)
        """Decay of a running mean of updates, which takes 4 bytes a weight; empty: none."""
        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times the learning rate."""
        scale_parameter: bool = False
        """Multiply the learning rate of a matrix by the root mean square of its weights. LoRA
        factors that start as zeros hardly move then."""

    def __init__(self, config: Adafactor.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        from transformers.optimization import Adafactor as Implementation

        config = self.config
        optimizer: torch.optim.Optimizer = Implementation(
            [dict(group) for group in parameters],
            lr=lr,
            eps=config.eps,
            clip_threshold=config.clip_threshold,
            decay_rate=config.decay_rate,
            beta1=config.beta1,
            weight_decay=config.weight_decay,
            scale_parameter=config.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )
        return optimizer
