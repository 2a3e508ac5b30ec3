"""LoRA: a trained low-rank update beside each chosen linear layer.

Hu et al., arXiv:2106.09685. Shape letters: R rank, I input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.linear_adapter import LinearAdapter, TargetOptions
from trainer.adapters.lora_linear import LoRALinear
from trainer.core.rng import generator
from trainer.core.seams import BuildContext


class LoRA(LinearAdapter):
    """Trains the factors of LoRA; the transformer itself stays frozen."""

    class Config(TargetOptions):
        """Options of `[adapter] kind = "lora"`."""

        rank: int = Field(16, ge=1, le=4096)
        """Rank of the update: more capacity, memory and file size with more."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Share of the rank-wide activations set to zero while training."""

    config: LoRA.Config

    def __init__(self, config: LoRA.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank

    @property
    def facts(self) -> Mapping[str, float]:
        """The same factors are another update at another scale."""
        return {"scale (alpha / rank)": self.scale}

    def make_layer(self, name: str, base: nn.Module, seed: int) -> LoRALinear:
        """Return a branch that adds nothing yet.

        The down factor (R, I) is Kaiming-uniform (a = √5, so ±1/√I); the up factor (O, R) is zero,
        so that the model is unchanged at the start.
        """
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank, device = self.config.rank, self.build.device
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(
            -bound, bound, generator=generator(seed, "adapter", name)
        )
        up = torch.zeros(outputs, rank, device=device)
        return LoRALinear(
            base, nn.Parameter(down.to(device)), nn.Parameter(up), self.scale, self.config.dropout
        )

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for.

        Raises:
            KeyError: a factor is missing.
        """
        names = [key.removesuffix(".down") for key in state if key.endswith(".down")]
        pairs = {name: (state[f"{name}.down"], state[f"{name}.up"]) for name in names}
        return {
            name: LoRAFactors(down, up, self.scale * down.shape[0])
            for name, (down, up) in pairs.items()
        }
