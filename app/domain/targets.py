"""What a config trains: every part with its rank, parameters and learning rate, and their sums."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.optimizers import state_bytes
from trainer.contract.memory_model.trained import (
    Targets,
    TrainedPart,
    adapter_options,
    find_targets,
)
from trainer.contract.memory_model.workload import shape_of, variant_of
from trainer.contract.targets import FROM_WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One trained layer, or one parameter of the model itself."""

    name: str
    type: str
    """The name without the block's number."""
    block: int | None
    inputs: int | None
    outputs: int | None
    rank: int | None
    alpha: float | None
    """None: the kind has none, or the file that training starts from tells."""
    parameters: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetList:
    """All that a config trains."""

    variant: str
    kind: str
    learning_rate: float
    """Of the optimizer; a module may have another."""
    up_lr_ratio: float
    """LoRA+: how many times as fast the up factors learn; 1: the same."""
    modules: tuple[Module, ...]
    output_parameters: int
    """Elements of an output file."""
    optimizer: str
    optimizer_bytes: int
    """State of the optimizer, of all processes together."""

    @property
    def total(self) -> int:
        """Trained elements."""
        return sum(module.parameters for module in self.modules)

    @property
    def by_type(self) -> dict[str, int]:
        """Type -> trained elements."""
        return _sums((module.type, module.parameters) for module in self.modules)

    @property
    def by_block(self) -> dict[int, int]:
        """Block -> trained elements; what is outside the blocks is left out."""
        inside = ((m.block, m.parameters) for m in self.modules if m.block is not None)
        return _sums(inside)

    def to_json(self) -> dict[str, Any]:
        """Return everything, sums included, as JSON values."""
        return {
            **asdict(self),
            "total": self.total,
            "by_type": self.by_type,
            "by_block": {str(block): count for block, count in self.by_block.items()},
        }


def target_list(config: RunConfig) -> TargetList:
    """Return what a config trains, from the header of its weights or from its variant.

    Raises:
        ConfigError: the variant cannot be told, or the patterns are wrong.
        ModelFileError: the file that training starts from cannot be read.
    """
    variant = variant_of(config)
    targets: Targets = find_targets(config, shape_of(config, variant))
    options, rate = adapter_options(config), config.optimizer.learning_rate
    optimizer = config.optimizer
    state = state_bytes(optimizer.kind, optimizer.options("kind"), targets.shapes)
    return TargetList(
        variant=variant.name,
        kind=config.adapter.kind,
        learning_rate=rate,
        up_lr_ratio=options.get("loraplus_lr_ratio") or 1.0,
        modules=tuple(_module(part, options, rate) for part in targets.parts),
        output_parameters=targets.output,
        optimizer=config.optimizer.kind,
        optimizer_bytes=round(state),
    )


def type_rows(found: TargetList) -> Iterator[tuple[str, ...]]:
    """Yield a row for the modules of one type that are trained alike: type, blocks, number of
    modules, rank, alpha, learning rate, parameters."""
    groups: dict[tuple[Any, ...], list[Module]] = defaultdict(list)
    for module in found.modules:
        groups[module.type, module.rank, module.alpha, module.learning_rate].append(module)
    for (kind, *_), modules in groups.items():
        blocks = [module.block for module in modules if module.block is not None]
        parameters = sum(module.parameters for module in modules)
        yield (kind, spans(blocks), str(len(modules)), *_figures(modules[0]), f"{parameters:,}")


def module_rows(found: TargetList) -> Iterator[tuple[str, ...]]:
    """Yield a row for each module: name, rank, alpha, learning rate, parameters."""
    for module in found.modules:
        yield (module.name, *_figures(module), f"{module.parameters:,}")


def spans(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: 0-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, dict.fromkeys(part))) for part in parts)


def _figures(module: Module) -> tuple[str, str, str]:
    rank = "" if module.rank is None else str(module.rank)
    alpha = "" if module.alpha is None else f"{module.alpha:g}"
    return rank, alpha, f"{module.learning_rate:g}"


def _module(part: TrainedPart, options: Mapping[str, Any], rate: float) -> Module:
    inside = part.name.split(".", 2) if part.name.startswith("blocks.") else None
    inputs, outputs = part.sizes or (None, None)
    return Module(
        name=part.name,
        type=part.name if inside is None else inside[2],
        block=None if inside is None else int(inside[1]),
        inputs=inputs,
        outputs=outputs,
        rank=part.rank,
        alpha=_alpha(part, options),
        parameters=part.parameters,
        learning_rate=rate * part.lr_factor,
    )


def _alpha(part: TrainedPart, options: Mapping[str, Any]) -> float | None:
    if part.alpha is not None or part.rank is None or "alpha" not in options:
        return part.alpha
    if options.get("rank") == FROM_WEIGHTS:
        return None
    return math.sqrt(part.rank) if options.get("rslora") else float(part.rank)


def _sums(pairs: Iterator[tuple[Any, int]]) -> dict[Any, int]:
    sums: dict[Any, int] = {}
    for key, count in pairs:
        sums[key] = sums.get(key, 0) + count
    return sums
