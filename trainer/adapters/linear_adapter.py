"""The kinds of adapter that put a layer of their own around each chosen linear layer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import Update
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.start import load_start, tensors_at
from trainer.adapters.targets import linear_layers
from trainer.adapters.wrapping import readable, unwrap, wrap
from trainer.contract.adapter_start import require_fitting, start_layers
from trainer.contract.lora_header import FileLayer
from trainer.contract.loraid import LoraidOptions, Partition, include_patterns, partition_of
from trainer.contract.loraid_metadata import loraid_metadata
from trainer.contract.options import Options
from trainer.contract.targets import FROM_WEIGHTS, LayerPlan, plan_layers
from trainer.core.seams import BuildContext, Technique

Rank = Annotated[int, Field(ge=1, le=4096)] | Literal["from_weights"]


class TargetOptions(Options):
    """What is trained, and how fast: options of every kind."""

    targets: Literal["all", "attention", "self_attention", "cross_attention", "ffn"] = "all"
    """What is trained of the blocks; `all` with kind `none`: the whole model."""
    include: tuple[str, ...] = ()
    """Regular expressions for whole names to train beyond what `targets` and `exclude` leave;
    `<4-11>` in one stands for any number from 4 to 11."""
    exclude: tuple[str, ...] = ()
    """Regular expressions for whole names, such as `blocks\\.0\\..*`, not to train."""
    lr_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Regular expression -> factor of the learning rate; the first that matches counts."""


class LinearOptions(TargetOptions):
    """Options of the kinds that put a layer of their own around linear layers."""

    loraid: LoraidOptions | None = None
    """`[adapter.loraid]`: train one of several disjoint parts of the network; empty: all of it."""
    init_from: Path | None = None
    """File of what this kind trains (safetensors, any known layout), to start from its weights."""


class RankOptions(LinearOptions):
    """Options of the kinds that have a rank and an alpha for each layer."""

    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field({})
    """Regular expression -> rank of the layers it matches; the first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Regular expression -> alpha of the layers it matches; the first that matches counts."""


class LinearAdapter(ABC):
    """`core.seams.Adapter` for such a kind. A kind says what a layer is and what a file holds.

    Trained parameters are named `<canonical module name>.<name in the layer>`.
    """

    kind: ClassVar[str]
    """Its name in a config."""
    network_module: ClassVar[str] = "networks.lora_wan"
    """`ss_network_module` of the files: which module of kohya-style tools reads them."""

    def __init__(self, config: LinearOptions, build: BuildContext) -> None:
        self.config = config
        self.build = build
        self.plan: dict[str, LayerPlan] = {}
        """Rank, alpha and learning rate of each layer, once it is injected."""
        self.in_file: Mapping[str, FileLayer] = {}
        """Layers of the file that training starts from, once it is injected."""
        self.file_alphas: Mapping[str, float] = {}
        """Alphas of that file, where the config takes them from it."""
        self._start: Mapping[str, Update] = {}
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
        scales = {
            name: self.plan[name.rpartition(".")[0]].lr_factor * self.lr_factor(name)
            for name in self.trainable()
        }
        return {name: scale for name, scale in scales.items() if scale != 1.0}

    def lr_factor(self, name: str) -> float:
        """Return the factor of one trained tensor that its part in the kind asks for."""
        return 1.0

    def begin(self, layer: AdapterLinear, update: Update) -> None:
        """Give a new layer the weights of the file that training starts from.

        Raises:
            ModelFileError: they are not what this kind writes.
        """
        with torch.no_grad():
            for name, tensor in self.from_file(layer, update).items():
                layer.get_parameter(name).copy_(tensor)

    def from_file(self, layer: AdapterLinear, update: Update) -> Mapping[str, Tensor]:
        """Return the trained tensors of a layer, by their names in it, that make an update.

        Raises:
            ModelFileError: they are not what this kind writes.
        """
        return tensors_at(update, float(layer.scale))  # type: ignore[arg-type]

    def techniques(self) -> Sequence[Technique]:
        """Return what this kind does beyond its layers while it trains."""
        return ()

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Freeze the transformer and put a layer around every target, in its mode of training.

        Raises:
            ConfigError: the patterns are wrong or select nothing.
            ModelFileError: the file that training starts from cannot be used.
        """
        if self._layers:
            raise RuntimeError("this adapter has been injected already")
        linears = linear_layers(transformer)
        self._plan(linears)
        if self.config.loraid is not None:
            self._partition = partition_of(self.config.loraid, linears)
        transformer.requires_grad_(False)
        for name in self.plan:
            with readable(transformer, name):
                layer = self.make_layer(name, linears[name], seed)
            if name in self._start:
                self.begin(layer, self._start[name])
            layer.train(transformer.training)
            wrap(transformer, name, layer)
            self._layers[name] = layer
        self._transformer = transformer
        self._start = {}  # it is in the layers now

    def _plan(self, linears: Mapping[str, nn.Module]) -> None:
        """Choose layers and ranks, and open the file that training starts from.

        A run that is resumed has its weights in the checkpoint, and takes none from that file.
        """
        options, path = self.config.model_dump(), self.config.init_from
        layers = None if path is None else start_layers(path, self.kind)
        self.plan = plan_layers(linears, options, layers)
        if layers is None:
            return
        sizes = {n: (int(m.in_features), int(m.out_features)) for n, m in linears.items()}  # type: ignore[arg-type]
        ranks = {name: layer.rank for name, layer in self.plan.items()}
        require_fitting(self.kind, options, sizes, layers, ranks)
        self.in_file = layers
        takes_alpha = options["rank"] == FROM_WEIGHTS and options.get("alpha", 1.0) is None
        if self.build.resumes and not takes_alpha:
            return
        start = load_start(self.kind, options, layers)
        if takes_alpha:  # a file of scale 0 has an update of 0
            self.file_alphas = {n: update.alpha or update.rank for n, update in start.items()}
        self._start = {} if self.build.resumes else start

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

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the transformer act as it did before anything was trained, while this is open."""
        self.set_strength(0.0)
        try:
            yield
        finally:
            self.set_strength(1.0)

    def network_args(self) -> dict[str, Any]:
        """Return the options that a reader of the file may want to know; of paths the name only.

        Of a slot the final patterns are told, which choose the same layers without LORAID, too.
        """
        options = self.config.model_dump(exclude_defaults=True)
        told = {k: v.name if isinstance(v, Path) else v for k, v in options.items()}
        if self._partition is not None:
            told |= {"include": include_patterns(self._layers), "exclude": [".*"]}
        return told

    def file_metadata(self) -> dict[str, str]:
        """Return what this kind says of itself in a file's header, beyond its options."""
        return {}

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
            **self.file_metadata(),
        }
        if self.config.loraid is not None and self._partition is not None:
            expert, slot = metadata.get("menma.expert"), self.config.loraid.slot
            facts |= loraid_metadata(self._partition, slot, expert=expert)
        save_adapter(
            self.updates(state), path, layout=layout, dtype=dtype, metadata={**metadata, **facts}
        )
