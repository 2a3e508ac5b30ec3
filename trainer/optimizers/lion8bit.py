"""Lion with a block-wise 8-bit state (arXiv:2302.06675, arXiv:2110.02861), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.lion import LionOptions
from trainer.optimizers.packages import optimizer_class


class Lion8bit(OptimizerFactory):
    """A byte of state a weight, the least of all optimizers here."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(LionOptions):
        """Options of `optimizer.kind = "lion8bit"`."""

        min_8bit_size: int = Field(4096, ge=1)
        """Tensors with fewer elements keep 32-bit states."""
        paged: bool = False
        """CUDA moves states to RAM and back where the GPU's memory is short; slower then."""

    def __init__(self, config: Lion8bit.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        name = "PagedLion8bit" if self.config.paged else "Lion8bit"
        optimizer = optimizer_class("lion8bit", name, "optim")(
            [dict(group) for group in parameters],
            lr=lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            min_8bit_size=self.config.min_8bit_size,
        )
        return cast("torch.optim.Optimizer", optimizer)
