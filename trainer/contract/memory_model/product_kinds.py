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
    """Return the elements a token takes on its way through W2 and W1, each made twice at most."""
    factor = options.get("factor")
    between = split_width(inputs, factor)[0] * split_width(outputs, factor)[1]
    return 2 * between + outputs


def dora_parameters(options: Options, inputs: int, outputs: int) -> int:
    """Return the numbers of a low-rank product and one length an output."""
    return int(options["rank"]) * (inputs + outputs) + outputs


def _lokr_sizes(options: Options, inputs: int, outputs: int) -> list[int]:
    shapes = lokr_shapes(
        inputs,
        outputs,
        int(options["rank"]),
        factor=options.get("factor"),
        decompose_both=bool(options.get("decompose_both", False)),
    )
    return [math.prod(shape) for shape in shapes.values()]
