"""What a layer of each kind of adapter trains, and the memory that it takes beside that.

The tables have the names of `[adapter] kind`. Options are those of the layer: `rank` and `alpha`
are its own where a config gives layers different ones, `in_file` is what it starts from where that
is a file, and `max_steps` are those of the run (ReLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.contract.memory_model.product_kinds import (
    dora_parameters,
    loha_parameters,
    lokr_largest,
    lokr_parameters,
    lokr_passing,
    lokr_passing_again,
    lokr_products,
    lokr_tensors,
)

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
    """Of what a token takes for the time of the product."""
    passing_again: int = 0
    """Of what it takes for that in the backward."""
    rescales: bool = False
    """The output is kept for the backward, which copies its gradient."""
    products: int = 0
    """Multiplications of a token in the forward, beside those of the low-rank activations."""


def _rank(options: Options) -> int:
    return int(options["rank"])


def _two_factors(options: Options, inputs: int, outputs: int) -> list[tuple[int, ...]]:
    return [(_rank(options), inputs), (outputs, _rank(options))]


def _frozen_rank(options: Options, steps: int) -> int:
    """Largest rank of what ReLoRA has frozen in a layer up to the end of so many steps.

    It begins with the rank of the file that training starts from, and grows by the trained rank
    with each restart, which cuts it to its limit.
    """
    first = options["in_file"].rank if "in_file" in options else 0
    restarts, limit = steps // int(options["restart_every_steps"]), options.get("frozen_max_rank")
    last = first + restarts * _rank(options)
    return max(first, min(last, int(limit)) if limit and restarts else last)


def _relora_rank(options: Options) -> int:
    """Rank of the frozen and of the trained part in the last step, and so that of the file."""
    return _frozen_rank(options, int(options["max_steps"]) - 1) + _rank(options)


def _relora_held(layers: Sequence[tuple[Options, Sizes]]) -> int:
    """The frozen part at the end of the run."""
    return sum(_frozen_rank(own, int(own["max_steps"])) * sum(sizes) for own, sizes in layers)


def _vera_held(layers: Sequence[tuple[Options, Sizes]]) -> int:
    """One matrix for each width at each end; all layers have one rank."""
    widths = {i for _, (i, _) in layers}, {o for _, (_, o) in layers}
    return _rank(layers[0][0]) * sum(map(sum, widths))


TRAINED_PARAMETERS: dict[str, Callable[[Options, int, int], int]] = {
    "lora": lambda options, *sizes: _rank(options) * sum(sizes),
    "tlora": lambda options, *sizes: _rank(options) * sum(sizes),
    "singlora": lambda options, *sizes: _rank(options) * max(sizes),
    "relora": lambda options, *sizes: _rank(options) * sum(sizes),
    "ggpo": lambda options, *sizes: _rank(options) * sum(sizes),
    "vera": lambda options, inputs, outputs: _rank(options) + outputs,
    "loha": loha_parameters,
    "lokr": lokr_parameters,
    "dora": dora_parameters,
}
"""Trained elements of a layer with so many inputs and outputs."""

LARGEST: dict[str, Callable[[Options, int, int], int]] = {
    "singlora": lambda options, *sizes: _rank(options) * max(sizes),
    "vera": lambda options, inputs, outputs: max(_rank(options), outputs),
    "loha": lambda options, *sizes: int(options["rank"]) * max(sizes),
    "lokr": lokr_largest,
    "dora": lambda options, *sizes: int(options["rank"]) * max(sizes),
}
"""Elements of a layer's largest trained tensor; what is not in the table trains two factors."""

SHAPES: dict[str, Callable[[Options, int, int], list[tuple[int, ...]]]] = {
    "singlora": lambda options, *sizes: [(max(sizes), _rank(options))],
    "vera": lambda options, inputs, outputs: [(_rank(options),), (outputs,)],
    "loha": lambda options, *sizes: 2 * _two_factors(options, *sizes),
    "lokr": lokr_tensors,
    "dora": lambda options, inputs, outputs: [
        *_two_factors(options, inputs, outputs),
        (outputs,),
    ],
}
"""Shapes of a layer's trained tensors; what is not in the table trains two factors."""

BRANCHES: dict[str, Callable[[Options, int, int], Branch]] = {
    "lora": lambda options, *sizes: _low_rank(_lora_width(options), *sizes),
    "loha": lambda options, *sizes: Branch(
        factors=loha_parameters(options, *sizes),
        formed=2 * math.prod(sizes),
        formed_again=2 * math.prod(sizes),
        passing_again=sizes[0],
        products=math.prod(sizes),
    ),
    "lokr": lambda options, *sizes: Branch(
        factors=lokr_parameters(options, *sizes),
        passing=lokr_passing(options, *sizes),
        passing_again=lokr_passing_again(options, *sizes),
        products=lokr_products(options, *sizes),
    ),
    "dora": lambda options, *sizes: replace(_low_rank(int(options["rank"]), *sizes), rescales=True),
    "relora": lambda options, *sizes: _low_rank(_relora_rank(options), *sizes),
}
"""What is not in the table is a low-rank product of the rank."""

HELD: dict[str, Callable[[Options, Sequence[tuple[Options, Sizes]]], int]] = {
    "lora": lambda options, layers: _lora_held(layers) if _keeps_start(options) else 0,
    "relora": lambda options, layers: _relora_held(layers),
    "ggpo": lambda options, layers: sum(2 * outputs for _, (_, outputs) in layers),
    "vera": lambda options, layers: _vera_held(layers),
    "dora": lambda options, layers: sum(outputs for _, (_, outputs) in layers),
}
"""Float32 elements that are kept on the GPU and not trained, of all layers together, given the
adapter's options and each layer's own. What is not in the table holds nothing."""

OUTPUT: dict[str, Callable[[Options, int, int], int]] = {
    "lora": lambda options, *sizes: _lora_width(options) * sum(sizes),
    "singlora": lambda options, *sizes: _rank(options) * sum(sizes),
    "relora": lambda options, *sizes: _relora_rank(options) * sum(sizes),
    "vera": lambda options, *sizes: _rank(options) * sum(sizes),
}
"""Elements of an output file for a layer with so many inputs and outputs; what is not in the table:
those that are trained."""


def trained_parameters(kind: str, options: Options, inputs: int, outputs: int) -> int:
    """Return the trained elements of one layer."""
    return TRAINED_PARAMETERS[kind](options, inputs, outputs)


def largest_tensor(kind: str, options: Options, inputs: int, outputs: int) -> int:
    """Return the elements of the largest trained tensor of one layer."""
    if kind in LARGEST:
        return LARGEST[kind](options, inputs, outputs)
    trained = trained_parameters(kind, options, inputs, outputs)
    return -(-trained * max(inputs, outputs) // (inputs + outputs))


def trained_shapes(
    kind: str, options: Options, inputs: int, outputs: int
) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the trained tensors of one layer."""
    return tuple(SHAPES.get(kind, _two_factors)(options, inputs, outputs))


def branch(kind: str, options: Options, inputs: int, outputs: int) -> Branch:
    """Return what one layer computes beside the base's product."""
    if kind in BRANCHES:
        return BRANCHES[kind](options, inputs, outputs)
    return _low_rank(int(options.get("rank") or 0), inputs, outputs)


def held_elements(kind: str, options: Options, layers: Sequence[tuple[Options, Sizes]]) -> int:
    """Return the float32 elements that are kept and not trained."""
    return HELD[kind](options, layers) if kind in HELD else 0


def output_elements(kind: str, options: Options, inputs: int, outputs: int) -> int:
    """Return the elements of an output file for one layer."""
    return OUTPUT.get(kind, TRAINED_PARAMETERS[kind])(options, inputs, outputs)


def _keeps_start(options: Options) -> bool:
    """Tell whether initial factors stay beside the trained ones (PiSSA)."""
    return str(options.get("init", "")).startswith("pissa")


def _low_rank(width: int, inputs: int, outputs: int) -> Branch:
    return Branch(width=width, factors=width * (inputs + outputs))


def _lora_width(options: Options) -> int:
    return int(options["rank"]) * (2 if _keeps_start(options) else 1)


def _lora_held(layers: Sequence[tuple[Options, Sizes]]) -> int:
    return sum(int(options["rank"]) * sum(sizes) for options, sizes in layers)
