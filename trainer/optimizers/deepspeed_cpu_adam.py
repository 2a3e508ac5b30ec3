"""DeepSpeed's AdamW for the CPU, in vector instructions, for an offloaded optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import AdamWOptions


class DeepSpeedCPUAdam(OptimizerFactory):
    """AdamW as torch's but for rounding; its first use compiles a module for minutes."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    class Config(AdamWOptions):
        """Options of `optimizer.kind = "deepspeed_cpu_adam"`."""

    def __init__(self, config: DeepSpeedCPUAdam.Config, build: BuildContext) -> None:
        self.config = config
        self.device = build.device

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: its module cannot be compiled or loaded.
        """
        from trainer.engine.deepspeed import cpu_adam

        return cpu_adam(
            [dict(group) for group in parameters],
            self.device,
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
        )
