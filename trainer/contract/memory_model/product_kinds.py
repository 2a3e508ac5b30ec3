"""What LoHa, LoKr and DoRA train in a linear layer, and what their products take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.contract.kronecker import lokr_shapes, split_width

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
    (small_in, _), (_, large_out) = _cut(options, inputs, outputs)
    return small_in * large_out + outputs


def lokr_passing_again(options: Options, inputs: int, outputs: int) -> int:
    """Return the elements that it takes in the backward."""
    (small_in, _), (small_out, large_out) = _cut(options, inputs, outputs)
    return small_in * large_out + max(small_in * small_out, inputs)


def lokr_products(options: Options, inputs: int, outputs: int) -> int:
    """Return the multiplications of a token: through W2, then through W1."""
    (small_in, large_in), (small_out, large_out) = _cut(options, inputs, outputs)
    return small_in * large_out * (large_in + small_out)


def dora_parameters(options: Options, inputs: int, outputs: int) -> int:
    """Return the numbers of a low-rank product and one length an output."""
    return int(options["rank"]) * (inputs + outputs) + outputs


def _cut(options: Options, inputs: int, outputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
    factor = options.get("factor")
    return split_width(inputs, factor), split_width(outputs, factor)


def lokr_tensors(options: Options, inputs: int, outputs: int) -> list[tuple[int, ...]]:
    """Return the shapes of W1 and W2, or of their factors."""
    shapes = lokr_shapes(
        inputs,
        outputs,
        int(options["rank"]),
        factor=options.get("factor"),
        decompose_both=bool(options.get("decompose_both", False)),
    )
    return list(shapes.values())


def _lokr_sizes(options: Options, inputs: int, outputs: int) -> list[int]:
    return [math.prod(shape) for shape in lokr_tensors(options, inputs, outputs)]
