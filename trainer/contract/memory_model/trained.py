"""What a config trains, part by part, and the memory model's view of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.contract.adapter_start import require_fitting, start_layers
from trainer.contract.config import RunConfig
from trainer.contract.lora_header import FileLayer
from trainer.contract.memory_model.adapter_kinds import (
    branch,
    held_elements,
    largest_tensor,
    output_elements,
    trained_parameters,
    trained_shapes,
)
from trainer.contract.memory_model.block import Trained
from trainer.contract.memory_model.operators import AdapterLayer
from trainer.contract.memory_model.weights import linear_shapes, num_parameters, parameter_sizes
from trainer.contract.plugin_options import plugin_schemas
from trainer.contract.targets import plan_layers, plan_parameters
from trainer.contract.variants import TransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPart:
    """A linear layer with an adapter on it, or a parameter of the model that is trained itself."""

    name: str
    parameters: int
    """Trained elements."""
    largest: int
    """Elements of its largest tensor."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of its trained tensors; of a parameter that is no matrix of a linear layer its length."""
    sizes: tuple[int, int] | None = None
    """Inputs and outputs of the layer; None: a parameter of the model."""
    rank: int | None = None
    alpha: float | None = None
    lr_factor: float = 1.0
    """Multiplies the learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is trained where."""

    parts: tuple[TrainedPart, ...]
    blocks: tuple[Trained, ...]
    first: int = 0
    """First block that something trained is in or in front of; their number where there is none."""
    held: int = 0
    """Float32 elements of adapters that are kept and not trained."""
    output: int = 0
    """Elements of an output file."""
    own_share: float = 0.0
    """Share of the blocks' matrices that are trained themselves."""

    @property
    def parameters(self) -> int:
        """All trained elements."""
        return sum(part.parameters for part in self.parts)

    @property
    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes of all trained tensors."""
        return (shape for part in self.parts for shape in part.shapes)

    @property
    def largest(self) -> int:
        """Elements of the largest trained tensor."""
        return max((part.largest for part in self.parts), default=0)

    @property
    def front(self) -> bool:
        """Whether weights of the model in front of the blocks are trained."""
        return any(block.front for block in self.blocks)


def adapter_options(config: RunConfig) -> dict[str, Any]:
    """Return the adapter's options, with the defaults of those that are not given."""
    schema = plugin_schemas()["adapter"][config.adapter.kind].get("properties", {})
    defaults = {key: spec["default"] for key, spec in schema.items() if "default" in spec}
    return {**defaults, **config.adapter.options("kind")}


def find_targets(config: RunConfig, shape: TransformerConfig) -> Targets:
    """Return what the config trains of a transformer of this shape.

    Raises:
        ConfigError: the patterns are wrong, or what they choose and `init_from` differ.
        ModelFileError: the ranks of `init_from` cannot be read.
    """
    options, kind = adapter_options(config), config.adapter.kind
    start = options.get("init_from")
    in_file = None if start is None else start_layers(Path(start), kind)
    if kind == "relora":
        options["max_steps"] = config.training.max_steps
    if in_file is not None:  # the file may change, so that nothing is remembered
        return _adapter_targets(shape, kind, options, in_file)
    return _remembered(shape, kind, json.dumps(options, default=str))


@lru_cache(maxsize=64)
def _remembered(shape: TransformerConfig, kind: str, options_json: str) -> Targets:
    options = json.loads(options_json)
    if kind == "none":
        return _own_targets(shape, options)
    return _adapter_targets(shape, kind, options, None)


def _adapter_targets(
    shape: TransformerConfig,
    kind: str,
    options: Mapping[str, Any],
    in_file: Mapping[str, FileLayer] | None,
) -> Targets:
    sizes = linear_shapes(shape)
    plan = plan_layers(sizes, options, in_file)
    if in_file is not None:
        ranks = {name: layer.rank for name, layer in plan.items()}
        require_fitting(kind, options, sizes, in_file, ranks)
    parts, blocks, layers = [], _Blocks(shape.num_layers), []
    for name, layer in plan.items():
        own: dict[str, Any] = {**options, "rank": layer.rank, "alpha": layer.alpha}
        if in_file is not None:
            own["in_file"] = in_file[name]
        inputs, outputs = sizes[name]
        trained = trained_parameters(kind, own, inputs, outputs)
        beside = branch(kind, own, inputs, outputs)
        layers.append((own, sizes[name]))
        blocks.add(name, AdapterLayer(trained, beside))
        parts.append(
            TrainedPart(
                name=name,
                parameters=trained,
                largest=largest_tensor(kind, own, inputs, outputs),
                shapes=trained_shapes(kind, own, inputs, outputs),
                sizes=sizes[name],
                rank=layer.rank,
                alpha=layer.alpha,
                lr_factor=layer.lr_factor,
            )
        )
    return Targets(
        parts=tuple(parts),
        blocks=blocks.with_adapters(),
        first=_first(plan, shape.num_layers),
        held=held_elements(kind, options, layers),
        output=sum(output_elements(kind, own, *size) for own, size in layers),
    )


def _own_targets(shape: TransformerConfig, options: Mapping[str, Any]) -> Targets:
    sizes, linears = parameter_sizes(shape), linear_shapes(shape)
    factors = plan_parameters(sizes, options)
    blocks = _Blocks(shape.num_layers)
    for name in factors:
        blocks.add(name.removesuffix(".weight").removesuffix(".bias"), None)
    matrices = [name for name in linears if name.startswith("blocks.")]
    trained = sum(sizes[f"{n}.weight"] for n in matrices if f"{n}.weight" in factors)
    return Targets(
        parts=tuple(
            TrainedPart(
                name=name,
                parameters=sizes[name],
                largest=sizes[name],
                shapes=(_shape_of(name, linears, sizes),),
                lr_factor=factor,
            )
            for name, factor in factors.items()
        ),
        blocks=blocks.with_own(front=any(_is_front(name) for name in factors)),
        first=_first(factors, shape.num_layers),
        output=num_parameters(shape),
        own_share=trained / sum(sizes[f"{name}.weight"] for name in matrices),
    )


def _shape_of(
    name: str, linears: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]
) -> tuple[int, ...]:
    layer = name.removesuffix(".weight")
    if layer == name or layer not in linears:
        return (sizes[name],)
    inputs, outputs = linears[layer]
    return outputs, inputs


class _Blocks:
    """Collects what is trained in each block."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._inside: defaultdict[int, list[tuple[str, AdapterLayer | None]]] = defaultdict(list)

    def add(self, name: str, layer: AdapterLayer | None) -> None:
        if (index := _block_of(name)) is not None:
            self._inside[index].append((name.split(".", 2)[2], layer))

    def with_adapters(self) -> tuple[Trained, ...]:
        return tuple(
            Trained(layers=tuple((name, layer) for name, layer in inside if layer is not None))
            for inside in self._of_each()
        )

    def with_own(self, *, front: bool) -> tuple[Trained, ...]:
        return tuple(
            Trained(own=frozenset(name for name, _ in inside), front=front)
            for inside in self._of_each()
        )

    def _of_each(self) -> Sequence[Sequence[tuple[str, AdapterLayer | None]]]:
        return [self._inside[index] for index in range(self._num)]


def _first(names: Mapping[str, object], num_blocks: int) -> int:
    if any(_is_front(name) for name in names):
        return 0
    return min((i for name in names if (i := _block_of(name)) is not None), default=num_blocks)


def _is_front(name: str) -> bool:
    return not name.startswith(("blocks.", "head."))


def _block_of(name: str) -> int | None:
    return int(name.split(".", 2)[1]) if name.startswith("blocks.") else None
