"""LoRA: a trained low-rank update beside each chosen linear layer.

Hu et al., arXiv:2106.09685. Shape letters: R rank, I input width, O output width.

Its options and their sources: scale α/√R instead of α/R (rsLoRA, Kalajdzievski, arXiv:2312.03732);
a start from the base's principal part (PiSSA, `pissa.py`); a faster up factor (LoRA+, Hayou et al.,
arXiv:2402.12354); dropped ranks and layers (`lora_dropout.py`) and bounded updates (`max_norm.py`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.linear_adapter import LinearAdapter, Rank, RankOptions
from trainer.adapters.lora_dropout import BranchDropout
from trainer.adapters.lora_linear import LoRALinear
from trainer.adapters.max_norm import MaxNorm
from trainer.adapters.pissa import KeptStart, principal_factors
from trainer.adapters.wrapping import base_weight
from trainer.core.rng import generator
from trainer.core.seams import Technique


class LoRA(LinearAdapter):
    """Trains the factors of LoRA; the transformer itself stays frozen."""

    kind = "lora"

    class Config(RankOptions):
        """Options of `[adapter] kind = "lora"`."""

        rank: Rank = 16
        """Rank of the update: more capacity, memory and file size with more. `from_weights`: the
        layers and the ranks of the file `init_from`."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank (with `rslora` its square root), so
        that the scale is 1. With `from_weights` the scale is the file's where this is empty."""
        rslora: bool = False
        """Scale by alpha / √rank instead, so that larger ranks learn as fast as small ones."""
        init: str = Field("kaiming", pattern="^(kaiming|pissa|pissa_niter_[1-9][0-9]?)$")
        """How factors begin: `kaiming` (random down, zero up), `pissa` (the principal part of the
        base's weight; the output is a LoRA of twice the rank), `pissa_niter_4` (nearly the same by
        a randomised SVD with 4 iterations, which is much quicker)."""
        loraplus_lr_ratio: float | None = Field(None, gt=0)
        """LoRA+: the up factors learn so many times as fast; 16 in the paper, try 4 first."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Share of the rank-wide activations set to zero while training."""
        rank_dropout: float = Field(0.0, ge=0, lt=1)
        """Share of the ranks that each sample trains without; the others count 1 / (1 - share)."""
        module_dropout: float = Field(0.0, ge=0, lt=1)
        """Share of the layers that each sample trains without."""
        scale_weight_norms: float | None = Field(None, gt=0)
        """Updates of layers whose Frobenius norm is larger are scaled down to it after each step;
        1 is usual. ZeRO 0 only."""

    config: LoRA.Config

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same factors are another update at another scale, or beside another start."""
        scales = {name: layer.scale for name, layer in self._lora_layers().items()}
        told: float | str = next(iter(scales.values()), 1.0)
        if len(set(scales.values())) > 1:
            told = f"by layer, {zlib.crc32(json.dumps(scales).encode()):08x}"
        start = {} if self.config.init == "kaiming" else {"init": "pissa"}
        return {"scale (alpha / rank)": told, **start}

    def lr_factor(self, name: str) -> float:
        """Return LoRA+'s ratio for up factors."""
        return (self.config.loraplus_lr_ratio or 1.0) if name.endswith(".up") else 1.0

    def techniques(self) -> Sequence[Technique]:
        """Return what drops ranks and layers, bounds updates, or keeps PiSSA's start."""
        config, layers = self.config, self._lora_layers()
        found: list[Technique] = []
        if config.rank_dropout or config.module_dropout:
            shares = config.rank_dropout, config.module_dropout
            found.append(BranchDropout(layers.values(), *shares, seed=self.build.seed))
        if config.scale_weight_norms is not None:
            found.append(MaxNorm(layers.values(), config.scale_weight_norms))
        if config.init != "kaiming":
            found.append(KeptStart(layers))
        return found

    def make_layer(self, name: str, base: nn.Module, seed: int) -> AdapterLinear:
        """Return a branch that adds nothing yet.

        The down factor (R, I) is Kaiming-uniform (a = √5, so ±1/√I); the up factor (O, R) is zero,
        so that the model is unchanged at the start. PiSSA's factors are those of the weight, and
        what they make at the start is taken off again by the layer.
        """
        rank, device = self.plan[name].rank, self.build.device
        assert rank is not None, "plan_layers gives a LoRA its rank"
        scale = self._scale(name, rank)
        random = generator(seed, "adapter", name)
        start: tuple[Tensor, Tensor] | None = None
        if self.config.init != "kaiming":
            weight_OI = base_weight(base).to(device, torch.float32)
            iterations = self.config.init.removeprefix("pissa").removeprefix("_niter_")
            down, up = start = principal_factors(
                weight_OI, rank, scale, int(iterations) if iterations else None, random
            )
        else:
            inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
            bound = 1 / math.sqrt(inputs)
            down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=random)
            up = torch.zeros(outputs, rank)
        down, up = (nn.Parameter(factor.to(device, copy=True)) for factor in (down, up))
        return LoRALinear(base, down, up, scale, self.config.dropout, start=start)

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return the update that `state`, keyed as `trainable`, stands for.

        Beside a kept start (A0, B0) it is s · (B A - B0 A0) = s · [B, -B0] [A; A0], a LoRA of twice
        the rank on the original weight.

        Raises:
            KeyError: a factor is missing.
        """
        updates: dict[str, Update] = {}
        for name, layer in self._lora_layers().items():
            down, up = state[f"{name}.down"], state[f"{name}.up"]
            if layer.has_start:
                down = torch.cat((down, layer.start_down.to(down)))
                up = torch.cat((up, -layer.start_up.to(up)), dim=1)
            updates[name] = LoRAFactors(down, up, layer.scale * down.shape[0])
        return updates

    def _scale(self, name: str, rank: int) -> float:
        divisor = math.sqrt(rank) if self.config.rslora else float(rank)
        alpha = self.plan[name].alpha
        if alpha is not None:
            return alpha / divisor
        return self.file_alphas[name] / rank if name in self.file_alphas else 1.0

    def _lora_layers(self) -> dict[str, LoRALinear]:
        return {n: layer for n, layer in self._layers.items() if isinstance(layer, LoRALinear)}
