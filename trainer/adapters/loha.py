"""Trains LoHa; `loha_linear` has its maths and sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.branch import BranchLinear, by_module
from trainer.adapters.linear_adapter import LinearAdapter, TargetOptions
from trainer.adapters.loha_linear import NAMES, HadamardProduct, loha_factors
from trainer.core.rng import generator
from trainer.core.seams import BuildContext

_STD = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}
"""Of the normal that each factor starts from: LyCORIS's, with which ΔW is 0 at the start."""


class LoHa(LinearAdapter):
    """Trains the factors of LoHa; the transformer itself stays frozen."""

    network_module = "networks.loha"

    class Config(TargetOptions):
        """Options of `[adapter] kind = "loha"`."""

        rank: int = Field(16, ge=1, le=4096)
        """Rank of each of the two products; the update's own rank may reach its square."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1."""

    config: LoHa.Config

    def __init__(self, config: LoHa.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank

    @property
    def facts(self) -> Mapping[str, float]:
        """The same factors are another update at another scale."""
        return {"scale (alpha / rank)": self.scale}

    def make_layer(self, name: str, base: nn.Module, seed: int) -> BranchLinear:
        """Return a product that adds nothing yet, because W2a is 0."""
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank, random = self.config.rank, generator(seed, "adapter", name)
        tensors = {}
        for key in NAMES:
            shape = (outputs, rank) if key.endswith("a") else (rank, inputs)
            drawn = torch.randn(shape, generator=random) * _STD[key]
            tensors[key] = nn.Parameter(drawn.to(self.build.device))
        return BranchLinear(base, tensors, HadamardProduct(), self.scale)

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for."""
        alpha = self.scale * self.config.rank
        return {name: loha_factors(own, alpha) for name, own in by_module(state).items()}
