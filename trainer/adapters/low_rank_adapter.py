"""What kinds have in common that train the two factors of a LoRA in a way of their own.

Shape letters: R rank, I input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.linear_adapter import LinearOptions, Rank
from trainer.adapters.scaled_adapter import ScaledAdapter
from trainer.core.rng import generator


class LowRankOptions(LinearOptions):
    """Options of such a kind."""

    rank: Rank = 16
    """Rank of the update: more capacity, memory and file size with more. `from_weights`: layers and
    ranks of `init_from`."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1, or the file's
    with rank `from_weights`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the rank-wide activations set to zero while training."""


class LowRankAdapter(ScaledAdapter):
    """Trains down and up factors; the file is an ordinary LoRA."""

    config: LowRankOptions

    def first_factors(self, name: str, base: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
        """Return factors to train that add nothing yet, float32 on the build's device.

        The down factor (R, I) is Kaiming-uniform (a = √5, so ±1/√I), the up factor (O, R) zero.
        """
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank = self.rank_of(name)
        down = random_down(rank, inputs, generator(seed, "adapter", name))
        up = torch.zeros(outputs, rank)
        down, up = (nn.Parameter(factor.to(self.build.device)) for factor in (down, up))
        return down, up

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update of each layer that `state`, keyed as `trainable`, stands for."""
        return {
            name: LoRAFactors(state[f"{name}.down"], state[f"{name}.up"], self.alpha_of(name))
            for name in self._layers
        }


def random_down(rank: int, inputs: int, random: torch.Generator) -> Tensor:
    """Return a down factor as LoRA begins with, (R, I) float32 within ±1/√I."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=random)
