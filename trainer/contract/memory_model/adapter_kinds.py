"""What a layer of each kind of adapter trains, and the memory that it takes beside that.

The tables have the names of `[adapter] kind`. Options are those of the layer: `rank` and `alpha`
are its own where a config gives layers different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Options = Mapping[str, Any]
Sizes = tuple[int, int]
"""Inputs and outputs of a linear layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What a layer computes beside the base's product, in elements."""

    width: int = 0
    """Of the low-rank activations of a token, which are kept for the backward."""
    factors: int = 0
    """Of what is kept for the backward in the dtype of the activations: the factors."""
    formed: int = 0
    """Of weight-sized matrices that the forward makes for the time of the product."""
    formed_again: int = 0
    """Of those that the backward makes."""
    passing: int = 0
    """Of what a token takes for the time of the product, there and in the backward."""


TRAINED_PARAMETERS: dict[str, Callable[[Options, int, int], int]] = {
    "lora": lambda options, inputs, outputs: int(options["rank"]) * (inputs + outputs),
}
"""Trained elements of a layer with so many inputs and outputs."""

BRANCHES: dict[str, Callable[[Options, int, int], Branch]] = {
    "lora": lambda options, *sizes: _low_rank(_lora_width(options), *sizes),
}
"""What is not in the table is a low-rank product of the rank."""

HELD: dict[str, Callable[[Options, Sequence[tuple[Options, Sizes]]], int]] = {
    "lora": lambda options, layers: _lora_held(layers) if _keeps_start(options) else 0,
}
"""Float32 elements that are kept on the GPU and not trained, of all layers together, given the
adapter's options and each layer's own. What is not in the table holds nothing."""

OUTPUT: dict[str, Callable[[Options, int], int]] = {
    "lora": lambda options, trained: trained * (2 if _keeps_start(options) else 1),
}
"""Elements of an output file, given those that are trained; what is not in the table: the same."""


def trained_parameters(kind: str, options: Options, inputs: int, outputs: int) -> int:
    """Return the trained elements of one layer."""
    return TRAINED_PARAMETERS[kind](options, inputs, outputs)


def branch(kind: str, options: Options, inputs: int, outputs: int) -> Branch:
    """Return what one layer computes beside the base's product."""
    if kind in BRANCHES:
        return BRANCHES[kind](options, inputs, outputs)
    return _low_rank(int(options.get("rank") or 0), inputs, outputs)


def held_elements(kind: str, options: Options, layers: Sequence[tuple[Options, Sizes]]) -> int:
    """Return the float32 elements that are kept and not trained."""
    return HELD[kind](options, layers) if kind in HELD else 0


def output_elements(kind: str, options: Options, trained: int) -> int:
    """Return the elements of an output file."""
    return OUTPUT[kind](options, trained) if kind in OUTPUT else trained


def _keeps_start(options: Options) -> bool:
    """Tell whether initial factors stay beside the trained ones (PiSSA)."""
    return str(options.get("init", "")).startswith("pissa")


def _low_rank(width: int, inputs: int, outputs: int) -> Branch:
    return Branch(width=width, factors=width * (inputs + outputs))


def _lora_width(options: Options) -> int:
    return int(options["rank"]) * (2 if _keeps_start(options) else 1)


def _lora_held(layers: Sequence[tuple[Options, Sizes]]) -> int:
    return sum(int(options["rank"]) * sum(sizes) for options, sizes in layers)
