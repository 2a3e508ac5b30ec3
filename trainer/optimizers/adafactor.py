"""Adafactor: second moments as sums over rows and columns (arXiv:1804.04235), by transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory


class Adafactor(OptimizerFactory):
    """Next to no state: of a matrix it keeps one number a row and one a column.

    The size of a step t is the run's learning rate, or that times the paper's relative step,
    min(10⁻², 1/√t), where 10⁻⁶·t stands for 10⁻² with its warm-up. (In transformers a relative step
    ignores the rate, and with it the run's own schedule.)
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
        step_size: Literal["fixed", "relative", "relative_warmup"] = "fixed"
        """What the learning rate is multiplied with: 1, the paper's relative step, or that with its
        warm-up, which takes 10,000 steps. With these two a `learning_rate` of 1 is the paper's."""
        scale_parameter: bool = False
        """Multiply the learning rate of a matrix by the root mean square of its weights. LoRA
        factors that start as zeros hardly move then."""

    def __init__(self, config: Adafactor.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        from transformers.optimization import Adafactor as Implementation

        class Adafactor(Implementation):  # type: ignore[misc]  # transformers has no types
            """With a rate that a relative step is multiplied with."""

            @staticmethod
            def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
                relative = Implementation._get_lr(param_group, param_state)
                return float(param_group["lr"] * relative if relative_step else relative)

        config = self.config
        relative_step = config.step_size != "fixed"
        optimizer: torch.optim.Optimizer = Adafactor(
            [dict(group) for group in parameters],
            lr=None if relative_step else lr,
            eps=config.eps,
            clip_threshold=config.clip_threshold,
            decay_rate=config.decay_rate,
            beta1=config.beta1,
            weight_decay=config.weight_decay,
            scale_parameter=config.scale_parameter,
            relative_step=relative_step,
            warmup_init=config.step_size == "relative_warmup",
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer
