"""Trains DoRA; `dora_linear` has its maths and source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.branch import by_module
from trainer.adapters.dora_linear import DoRAFactors, DoRALinear, squared_rows
from trainer.adapters.formats.names import block_index
from trainer.adapters.linear_adapter import LinearAdapter, TargetOptions
from trainer.core.rng import generator
from trainer.core.seams import BuildContext
from trainer.memory.block_swap import BlockSwap
from trainer.models.block_stack import BlockStack


class DoRA(LinearAdapter):
    """Trains factors and magnitudes; the transformer itself stays frozen."""

    network_module = "lycoris.kohya"

    class Config(TargetOptions):
        """Options of `[adapter] kind = "dora"`."""

        rank: int = Field(16, ge=1, le=4096)
        """Rank of the update of the rows' directions."""
        alpha: float | None = Field(None, gt=0)
        """That update is scaled by alpha / rank; empty: the rank, so that the scale is 1."""

    config: DoRA.Config

    def __init__(self, config: DoRA.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank
        self._swap: BlockSwap | None = None

    @property
    def facts(self) -> Mapping[str, float]:
        """The same factors are another update at another scale."""
        return {"scale (alpha / rank)": self.scale}

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Freeze the transformer and put a layer around every target.

        Weights that are streamed come to the device once, for the lengths of their rows.

        Raises:
            ConfigError: the patterns are wrong or select nothing.
        """
        blocks = getattr(transformer, "blocks", None)
        self._swap = blocks.swap if isinstance(blocks, BlockStack) else None
        with nullcontext() if self._swap is None else self._swap.forward(returns=False):
            super().inject(transformer, seed)
        if self._swap is not None:
            self._swap.release()

    def make_layer(self, name: str, base: nn.Module, seed: int) -> DoRALinear:
        """Return a layer that changes nothing yet.

        The down factor is Kaiming-uniform (a = √5, so ±1/√I), the up factor zero, and the
        magnitudes are the lengths of the base's rows.
        """
        index = block_index(name)
        if self._swap is not None and index is not None:
            self._swap.need(index)
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank, device = self.config.rank, self.build.device
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(
            -bound, bound, generator=generator(seed, "adapter", name)
        )
        with torch.no_grad():
            squares = squared_rows(base).to(device, torch.float32)
        return DoRALinear(
            base,
            nn.Parameter(down.to(device)),
            nn.Parameter(torch.zeros(outputs, rank, device=device)),
            nn.Parameter(squares.sqrt()),
            self.scale,
            squares,
        )

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for."""
        alpha = self.scale * self.config.rank
        return {
            name: DoRAFactors(own["down"], own["up"], own["magnitude"], alpha)
            for name, own in by_module(state).items()
        }

    def network_args(self) -> dict[str, Any]:
        """Return the options, and LyCORIS's names for what this is."""
        return {"algo": "lora", "dora_wd": True, "wd_on_output": True, **super().network_args()}
