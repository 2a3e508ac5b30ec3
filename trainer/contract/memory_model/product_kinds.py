"""How many numbers LoHa, LoKr and DoRA train in a linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.contract.kronecker import lokr_shapes

_RANK = 16
"""Where no rank is given; a test keeps it equal to the kinds' own."""


def loha_parameters(options: Mapping[str, Any], inputs: int, outputs: int) -> int:
    """Return the numbers of two low-rank products."""
    return 2 * int(options.get("rank", _RANK)) * (inputs + outputs)


def lokr_parameters(options: Mapping[str, Any], inputs: int, outputs: int) -> int:
    """Return the numbers of W1 and W2, or of their factors."""
    shapes = lokr_shapes(
        inputs,
        outputs,
        int(options.get("rank", _RANK)),
        factor=options.get("factor"),
        decompose_both=bool(options.get("decompose_both", False)),
    )
    return sum(math.prod(shape) for shape in shapes.values())


def dora_parameters(options: Mapping[str, Any], inputs: int, outputs: int) -> int:
    """Return the numbers of a low-rank product and one length an output."""
    return int(options.get("rank", _RANK)) * (inputs + outputs) + outputs
