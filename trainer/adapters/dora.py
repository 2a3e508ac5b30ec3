"""Trains DoRA; `dora_linear` has its maths and source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.dora_linear import DoRAFactors, DoRALinear, squared_rows
from trainer.adapters.linear_adapter import Rank
from trainer.adapters.scaled_adapter import ScaledAdapter, ScaledOptions, by_module
from trainer.core.rng import generator


class DoRA(ScaledAdapter):
    """Trains factors and magnitudes; the transformer itself stays frozen."""

    kind = "dora"
    network_module = "lycoris.kohya"

    class Config(ScaledOptions):
        """Options of `[adapter] kind = "dora"`."""

        rank: Rank = 16
        """Rank of the update of the rows' directions.
        `from_weights`: layers and ranks of `init_from`."""

    config: DoRA.Config

    def make_layer(self, name: str, base: nn.Module, seed: int) -> DoRALinear:
        """Return a layer that changes nothing yet.

        The down factor is Kaiming-uniform (a = √5, so ±1/√I), the up factor zero, and the
        magnitudes are the lengths of the base's rows.
        """
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank, device = self.rank_of(name), self.build.device
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(
            -bound, bound, generator=generator(seed, "adapter", name)
        )
        if device.type == "meta":  # sizes are asked for, and no weights are there to be measured
            squares = torch.empty(outputs, dtype=torch.float32, device=device)
        else:
            with torch.no_grad():
                squares = squared_rows(base).to(device, torch.float32)
        return DoRALinear(
            base,
            nn.Parameter(down.to(device)),
            nn.Parameter(torch.zeros(outputs, rank, device=device)),
            nn.Parameter(squares.sqrt()),
            self.alpha_of(name) / rank,
            squares,
        )

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for."""
        return {
            name: DoRAFactors(own["down"], own["up"], own["magnitude"], self.alpha_of(name))
            for name, own in by_module(state).items()
        }

    def network_args(self) -> dict[str, Any]:
        """Return the options, and LyCORIS's names for what this is."""
        return {"algo": "lora", "dora_wd": True, "wd_on_output": True, **super().network_args()}
