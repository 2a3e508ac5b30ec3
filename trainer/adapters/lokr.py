"""Trains LoKr; `lokr_linear` has its maths and sources."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.base import Update
from trainer.adapters.branch import BranchLinear
from trainer.adapters.linear_adapter import Rank
from trainer.adapters.lokr_linear import kronecker_layer, lokr_factors
from trainer.adapters.scaled_adapter import ScaledAdapter, ScaledOptions, by_module
from trainer.contract.kronecker import lokr_shapes
from trainer.core.rng import generator


class LoKr(ScaledAdapter):
    """Trains the matrices of LoKr; the transformer itself stays frozen."""

    kind = "lokr"
    network_module = "networks.lokr"

    class Config(ScaledOptions):
        """Options of `[adapter] kind = "lokr"`."""

        rank: Rank = 16
        """Rank of the larger matrix W2. Half its larger side or more: it is trained whole.
        `from_weights`: the layers of `init_from`, their matrices cut as they are there."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1, or the
        file's with rank `from_weights`. A layer of two whole matrices always has scale 1."""
        factor: int | None = Field(None, ge=2, le=4096)
        """Size of the smaller matrix W1: each width is cut into this and the rest, or a smaller
        divisor. Larger: W2 is smaller, and with it the file; empty: cut near the square root."""
        decompose_both: bool = False
        """Make W1 a product of two factors, too, where its size allows it."""

    config: LoKr.Config

    def make_layer(self, name: str, base: nn.Module, seed: int) -> BranchLinear:
        """Return a product that adds nothing yet, because W2 or its second factor is 0.

        The others are Kaiming-uniform (a = √5, so ±1/√columns), as in LyCORIS.
        """
        random = generator(seed, "adapter", name)
        if name in self.in_file:
            shapes = self.in_file[name].shapes
        else:
            inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
            cut = self.config.factor, self.config.decompose_both
            shapes = lokr_shapes(
                inputs, outputs, self.rank_of(name), factor=cut[0], decompose_both=cut[1]
            )
        tensors = {}
        for key, shape in shapes.items():
            bound = 0.0 if key in {"w2", "w2_b"} else 1 / math.sqrt(shape[1])
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=random)
            tensors[key] = nn.Parameter(drawn.to(self.build.device))
        return kronecker_layer(base, tensors, lokr_factors(tensors, self.alpha_of(name)).scale)

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for."""
        return {
            name: lokr_factors(own, self.alpha_of(name)) for name, own in by_module(state).items()
        }
