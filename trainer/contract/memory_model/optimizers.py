"""Memory of optimizers: their state, and what an update takes for a moment.

Sizes are in bytes. A test builds every optimizer and counts its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.contract.plugin_options import plugin_schemas

Shape = tuple[int, ...]
Options = Mapping[str, Any]

FLOAT32, BF16 = 4, 2
QUANTISED_TOGETHER = 256
"""Elements of an 8-bit state that share a float32 scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerMemory:
    """What one optimizer takes."""

    state: Callable[[Options, Shape], float]
    """Of a trained tensor, given the optimizer's options."""
    temporary: float = 0.0
    """A trained element, while weights are updated."""


def _each(size: float) -> Callable[[Options, Shape], float]:
    return lambda options, shape: size * math.prod(shape)


def _eight_bit(moments: int) -> Callable[[Options, Shape], float]:
    def size(options: Options, shape: Shape) -> float:
        elements = math.prod(shape)
        if elements < options["min_8bit_size"]:
            return moments * FLOAT32 * elements
        return moments * (elements + FLOAT32 * -(-elements // QUANTISED_TOGETHER))

    return size


def _bf16(options: Options, shape: Shape) -> float:
    lost = BF16 if options["rounding"] == "kahan" else 0
    return (2 * FLOAT32 + lost) * math.prod(shape)


def _sides(shape: Shape) -> int:
    """Return the numbers of a tensor's row and column sums."""
    return math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))


def _adafactor(options: Options, shape: Shape) -> float:
    moment = _sides(shape) if len(shape) > 1 else math.prod(shape)
    mean = 0 if options["beta1"] is None else math.prod(shape)
    return FLOAT32 * (moment + mean)


def _came(options: Options, shape: Shape) -> float:
    sums = 2 * _sides(shape) if len(shape) > 1 else math.prod(shape)
    return FLOAT32 * (math.prod(shape) + sums)


def _muon(options: Options, shape: Shape) -> float:
    return FLOAT32 * math.prod(shape) * (1 if len(shape) == 2 else 2)


def _soap(options: Options, shape: Shape) -> float:
    rotated = [side for side in shape if side <= options["max_precondition_dim"]]
    squares = sum(side * side for side in rotated) if len(shape) > 1 else 0
    return FLOAT32 * (2 * math.prod(shape) + 2 * squares)


OPTIMIZERS: dict[str, OptimizerMemory] = {
    # Two moments, float32; the fused kernel needs nothing more.
    "adamw": OptimizerMemory(state=_each(8)),
    "adamw8bit": OptimizerMemory(state=_eight_bit(2)),
    "adamw_bf16": OptimizerMemory(state=_bf16),
    "deepspeed_cpu_adam": OptimizerMemory(state=_each(8)),
    "lion": OptimizerMemory(state=_each(4), temporary=4),
    "lion8bit": OptimizerMemory(state=_eight_bit(1)),
    "adafactor": OptimizerMemory(state=_adafactor),
    "came": OptimizerMemory(state=_came, temporary=8),
    "prodigy": OptimizerMemory(state=_each(16), temporary=8),
    "schedulefree": OptimizerMemory(state=_each(8), temporary=4),
    "muon": OptimizerMemory(state=_muon, temporary=4),
    "soap": OptimizerMemory(state=_soap),
    "sophia": OptimizerMemory(state=_each(8)),
    "scion": OptimizerMemory(state=_each(4), temporary=4),
    "automagic": OptimizerMemory(state=_each(8)),
    # Not known; most keep two moments.
    "custom": OptimizerMemory(state=_each(8), temporary=8),
}
"""Temporaries are those of updates of all tensors at once; of one tensor after the other they are
small."""


def optimizer_memory(kind: str) -> OptimizerMemory:
    """Return the figures of an optimizer; one that is not in the table counts as AdamW."""
    return OPTIMIZERS.get(kind, OPTIMIZERS["adamw"])


def state_bytes(kind: str, options: Options, shapes: Iterable[Shape]) -> float:
    """Return the size of an optimizer's state.

    Args:
        kind: as in `optimizer.kind`.
        options: those that the config gives.
        shapes: of the trained tensors.
    """
    schema = plugin_schemas()["optimizer"].get(kind, {}).get("properties", {})
    defaults = {key: spec.get("default") for key, spec in schema.items()}
    size = optimizer_memory(kind).state
    return sum(size({**defaults, **options}, shape) for shape in shapes)
