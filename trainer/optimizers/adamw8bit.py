"""AdamW with block-wise 8-bit states (Dettmers et al., arXiv:2110.02861), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import AdamWOptions
from trainer.optimizers.packages import optimizer_class


class AdamW8bit(OptimizerFactory):
    """A quarter of AdamW's state memory; small tensors keep 32-bit states."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(AdamWOptions):
        """Options of `optimizer.kind = "adamw8bit"`."""

        min_8bit_size: int = Field(4096, ge=1)
        """Tensors with fewer elements keep 32-bit states."""
        paged: bool = False
        """CUDA moves states to RAM and back where the GPU's memory is short; slower then."""

    def __init__(self, config: AdamW8bit.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        name = "PagedAdamW8bit" if self.config.paged else "AdamW8bit"
        optimizer = optimizer_class("adamw8bit", name, "optim")(
            [dict(group) for group in parameters],
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            min_8bit_size=self.config.min_8bit_size,
        )
        return cast("torch.optim.Optimizer", optimizer)
