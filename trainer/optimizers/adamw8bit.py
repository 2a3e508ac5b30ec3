"""AdamW with block-wise 8-bit states (Dettmers et al., arXiv:2110.02861), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from trainer.contract.errors import ConfigError
from trainer.core.seams import BuildContext
from trainer.optimizers.adamw import AdamWOptions


class AdamW8bit:
    """A quarter of AdamW's state memory; small tensors keep 32-bit states."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(AdamWOptions):
        """Options of `optimizer.kind = "adamw8bit"`."""

        min_8bit_size: int = Field(4096, ge=1)
        """Tensors with fewer elements keep 32-bit states."""

    def __init__(self, config: AdamW8bit.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        try:
            from bitsandbytes.optim import AdamW8bit as Implementation
        except ImportError as error:
            raise ConfigError(
                f"optimizer adamw8bit needs bitsandbytes: {error}",
                hint="pip install bitsandbytes, or set optimizer.kind = 'adamw'",
            ) from error
        optimizer = Implementation(
            [dict(group) for group in parameters],
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            min_8bit_size=self.config.min_8bit_size,
        )
        return cast("torch.optim.Optimizer", optimizer)
