"""Trains LoHa; `loha_linear` has its maths and sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.branch import BranchLinear
from trainer.adapters.linear_adapter import Rank
from trainer.adapters.loha_linear import NAMES, HadamardProduct, loha_factors
from trainer.adapters.scaled_adapter import ScaledAdapter, ScaledOptions, by_module
from trainer.core.rng import generator

_STD = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}
"""Of the normal that each factor starts from: LyCORIS's, with which ΔW is 0 at the start."""


class LoHa(ScaledAdapter):
    """Trains the factors of LoHa; the transformer itself stays frozen."""

    kind = "loha"
    network_module = "networks.loha"

    class Config(ScaledOptions):
        """Options of `[adapter] kind = "loha"`."""

        rank: Rank = 16
        """Rank of each of the two products; the update's own rank may reach its square.
        `from_weights`: layers and ranks of `init_from`."""

    config: LoHa.Config

    def make_layer(self, name: str, base: nn.Module, seed: int) -> BranchLinear:
        """Return a product that adds nothing yet, because W2a is 0."""
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank, random = self.rank_of(name), generator(seed, "adapter", name)
        tensors = {}
        for key in NAMES:
            shape = (outputs, rank) if key.endswith("a") else (rank, inputs)
            drawn = torch.randn(shape, generator=random) * _STD[key]
            tensors[key] = nn.Parameter(drawn.to(self.build.device))
        return BranchLinear(base, tensors, HadamardProduct(), self.alpha_of(name) / rank)

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for."""
        return {
            name: loha_factors(own, self.alpha_of(name)) for name, own in by_module(state).items()
        }
