"""The kinds of adapter that put a layer of their own around each chosen linear layer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import Update
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.targets import linear_layers, select_targets
from trainer.adapters.wrapping import unwrap, wrap
from trainer.contract.loraid import (
    LoraidOptions,
    Partition,
    in_slot,
    include_patterns,
    partition_of,
)
from trainer.contract.loraid_metadata import loraid_metadata
from trainer.contract.options import Options
from trainer.core.seams import BuildContext, Technique


class TargetOptions(Options):
    """Which layers are trained: options of every kind that works on linear layers."""

    include: tuple[str, ...] = ()
    """Regular expressions for whole layer names to train beyond those left by `exclude`."""
    exclude: tuple[str, ...] = ()
    """Regular expressions for whole layer names, such as `blocks\\.0\\..*`, not to train."""
    loraid: LoraidOptions | None = None
    """`[adapter.loraid]`: train one of several disjoint parts of the network; empty: all of it."""


class LinearAdapter(ABC):
    """`core.seams.Adapter` for such a kind. A kind says what a layer is and what a file holds.

    Trained parameters are named `<canonical module name>.<name in the layer>`.
    """

    network_module: ClassVar[str] = "networks.lora_wan"
    """`ss_network_module` of the files: which module of kohya-style tools reads them."""

    def __init__(self, config: TargetOptions, build: BuildContext) -> None:
        self.config = config
        self.build = build
        self._layers: dict[str, AdapterLinear] = {}
        self._transformer: nn.Module | None = None
        self._partition: Partition | None = None

    @abstractmethod
    def make_layer(self, name: str, base: nn.Module, seed: int) -> AdapterLinear:
        """Return the layer for one target, its trained tensors float32 on the build's device.

        Random numbers must depend on seed and name alone, not on the other targets.
        """

    @abstractmethod
    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return what the output file holds of `state`, which is keyed as `trainable`."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """Return what the trained tensors' meaning depends on; see `core.seams.Adapter`."""

    def lr_scales(self) -> Mapping[str, float]:
        """Return factors of the learning rate by trainable name; absent: 1."""
        return {}

    def techniques(self) -> Sequence[Technique]:
        """Return what this kind does beyond its layers while it trains."""
        return ()

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Freeze the transformer and put a layer around every target, in its mode of training.

        Raises:
            ConfigError: the patterns are wrong or select nothing.
        """
        if self._layers:
            raise RuntimeError("this adapter has been injected already")
        linears = linear_layers(transformer)
        names = select_targets(linears, self.config.include, self.config.exclude)
        names = in_slot(names, linears, self.config.loraid)
        if self.config.loraid is not None:
            self._partition = partition_of(self.config.loraid, linears)
        transformer.requires_grad_(False)
        for name in names:
            layer = self.make_layer(name, linears[name], seed)
            layer.train(transformer.training)
            wrap(transformer, name, layer)
            self._layers[name] = layer
        self._transformer = transformer

    def remove(self) -> None:
        """Take the adapter off the transformer again; the base stays frozen."""
        if self._transformer is not None:
            for name, layer in self._layers.items():
                unwrap(self._transformer, name, layer)
        self._layers, self._transformer = {}, None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the layers' own parameters, layer by layer."""
        return {
            f"{name}.{own}": parameter
            for name, layer in self._layers.items()
            for own, parameter in layer.named_parameters(recurse=False)
        }

    def set_strength(self, strength: float) -> None:
        """Multiply the update by `strength`; 0 gives the base model, exactly."""
        for layer in self._layers.values():
            layer.strength = strength

    def network_args(self) -> dict[str, Any]:
        """Return the options that a reader of the file may want to know.

        Of a slot the final patterns are told, which choose the same layers without LORAID, too.
        """
        told: dict[str, Any] = self.config.model_dump(mode="json", exclude_defaults=True)
        if self._partition is not None:
            told |= {"include": include_patterns(self._layers), "exclude": [".*"]}
        return told

    def write_output(
        self,
        state: Mapping[str, Tensor],
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the file from full tensors keyed as in `trainable`, and verify it.

        Raises:
            ModelFileError: a value is not finite or does not fit `dtype`.
            DiskError: the disk is full, read-only or faulty.
        """
        facts = {
            "ss_network_module": self.network_module,
            "ss_network_args": json.dumps(self.network_args()),
            "ss_network_dropout": str(getattr(self.config, "dropout", 0.0) or None),
        }
        if self.config.loraid is not None and self._partition is not None:
            expert, slot = metadata.get("menma.expert"), self.config.loraid.slot
            facts |= loraid_metadata(self._partition, slot, expert=expert)
        save_adapter(
            self.updates(state), path, layout=layout, dtype=dtype, metadata={**metadata, **facts}
        )
