"""LoRA: a trained low-rank update beside each chosen linear layer.

Hu et al., arXiv:2106.09685. Shape letters: R rank, I input width, O output width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.lora_linear import LoRALinear
from trainer.adapters.targets import linear_layers, select_targets
from trainer.adapters.wrapping import unwrap, wrap
from trainer.contract.options import Options
from trainer.core.rng import generator
from trainer.core.seams import BuildContext


class LoRA:
    """Trains the factors of LoRA; the transformer itself stays frozen."""

    class Config(Options):
        """Options of `[adapter] kind = "lora"`."""

        rank: int = Field(16, ge=1, le=4096)
        """Rank of the update: more capacity, memory and file size with more."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Share of the rank-wide activations set to zero while training."""
        include: tuple[str, ...] = ()
        """Regular expressions for whole layer names to train beyond those left by `exclude`."""
        exclude: tuple[str, ...] = ()
        """Regular expressions for whole layer names, such as `blocks\\.0\\..*`, not to train."""

    def __init__(self, config: LoRA.Config, build: BuildContext) -> None:
        self.config = config
        self.device = build.device
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank
        self._layers: dict[str, LoRALinear] = {}
        self._transformer: nn.Module | None = None

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Freeze the transformer and put a LoRA on every target layer, in training mode.

        The down factor is Kaiming-uniform (a = √5, so ±1/√I) from a random stream named after the
        layer, so that it depends on the seed and the name alone; the up factor is zero, so that
        the model is unchanged at the start. Factors are float32, on the build context's device;
        they are computed with in the transformer's dtype.

        Raises:
            ConfigError: the patterns are wrong or select nothing.
        """
        if self._layers:
            raise RuntimeError("this LoRA has been injected already")
        linears = linear_layers(transformer)
        names = select_targets(linears, self.config.include, self.config.exclude)
        transformer.requires_grad_(False)
        for name in names:
            base = linears[name]
            down, up = self._new_factors(name, base, seed)
            layer = LoRALinear(base, down, up, self.scale, self.config.dropout)
            layer.train(transformer.training)
            wrap(transformer, name, layer)
            self._layers[name] = layer
        self._transformer = transformer

    def remove(self) -> None:
        """Take the LoRA off the transformer again; the base stays frozen."""
        if self._transformer is not None:
            for name, layer in self._layers.items():
                unwrap(self._transformer, name, layer)
        self._layers, self._transformer = {}, None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the factors as `<canonical module name>.down` (R, I) and `.up` (O, R)."""
        return {
            f"{name}.{factor}": layer.get_parameter(factor)
            for name, layer in self._layers.items()
            for factor in ("down", "up")
        }

    def set_strength(self, strength: float) -> None:
        """Multiply the update by `strength`; 0 gives the base model, exactly."""
        for layer in self._layers.values():
            layer.strength = strength

    def factors(self, state: Mapping[str, Tensor]) -> dict[str, LoRAFactors]:
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

    def write_output(
        self,
        state: Mapping[str, Tensor],
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the LoRA file from full tensors keyed as in `trainable`, and verify it.

        Raises:
            ModelFileError: a value is not finite or does not fit `dtype`.
            DiskError: the disk is full, read-only or faulty.
        """
        options = self.config.model_dump(mode="json", exclude_defaults=True)
        facts = {
            "ss_network_module": "networks.lora_wan",
            "ss_network_args": json.dumps(options),
            "ss_network_dropout": str(self.config.dropout or None),
        }
        save_adapter(
            self.factors(state), path, layout=layout, dtype=dtype, metadata={**metadata, **facts}
        )

    def _new_factors(
        self, name: str, base: nn.Module, seed: int
    ) -> tuple[nn.Parameter, nn.Parameter]:
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        rank = self.config.rank
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(rank, inputs).uniform_(
            -bound, bound, generator=generator(seed, "adapter", name)
        )
        up = torch.zeros(outputs, rank, device=self.device)
        return nn.Parameter(down.to(self.device)), nn.Parameter(up)
