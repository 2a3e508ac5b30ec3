"""What LoHa, LoKr and DoRA train in a linear layer, and what their products take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.contract.kronecker import lokr_shapes

Options = Mapping[str, Any]


def loha_parameters(options: Options, inputs: int, outputs: int) -> int:
    """Return the numbers of two low-rank products."""
    return 2 * int(options["rank"]) * (inputs + outputs)


def lokr_parameters(options: Options, inputs: int, outputs: int) -> int:
    """Return the numbers of W1 and W2, or of their factors."""
    return sum(_lokr_sizes(options, inputs, outputs))


def lokr_largest(options: Options, inputs: int, outputs: int) -> int:
    """Return the numbers of the largest of them."""
    return max(_lokr_sizes(options, inputs, outputs))


def lokr_passing(options: Options, inputs: int, outputs: int) -> int:
    """Return the elements that a token takes on its way through W2 and W1."""
    (_, small_in), (large_out, _) = _cut(options, inputs, outputs)
    return small_in * large_out + outputs


def lokr_passing_again(options: Options, inputs: int, outputs: int) -> int:
    """Return the elements that it takes in the backward."""
    (small_out, small_in), (large_out, _) = _cut(options, inputs, outputs)
    return small_in * large_out + max(small_in * small_out, inputs)


def lokr_products(options: Options, inputs: int, outputs: int) -> int:
    """Return the multiplications of a token: through W2, then through W1."""
    (small_out, small_in), (large_out, large_in) = _cut(options, inputs, outputs)
    return small_in * large_out * (large_in + small_out)


def dora_parameters(options: Options, inputs: int, outputs: int) -> int:
    """Return the numbers of a low-rank product and one length an output."""
    return int(options["rank"]) * (inputs + outputs) + outputs


def lokr_tensors(options: Options, inputs: int, outputs: int) -> list[tuple[int, ...]]:
    """Return the shapes of W1 and W2, or of their factors."""
    return list(_lokr_shapes(options, inputs, outputs).values())


def _lokr_shapes(options: Options, inputs: int, outputs: int) -> Mapping[str, tuple[int, ...]]:
    if "in_file" in options:  # it may be cut in any way
        shapes: Mapping[str, tuple[int, ...]] = options["in_file"].shapes
        return shapes
    return lokr_shapes(
        inputs,
        outputs,
        int(options["rank"]),
        factor=options.get("factor"),
        decompose_both=bool(options.get("decompose_both", False)),
    )


def _cut(options: Options, inputs: int, outputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return rows and columns of W1 and of W2."""
    shapes = _lokr_shapes(options, inputs, outputs)
    first, second = (
        shapes[name] if name in shapes else (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1])
        for name in ("w1", "w2")
    )
    return (first[0], first[1]), (second[0], second[1])


def _lokr_sizes(options: Options, inputs: int, outputs: int) -> list[int]:
    return [math.prod(shape) for shape in lokr_tensors(options, inputs, outputs)]
