"""How LoKr cuts the widths of a layer, and which tensors it then has. Shared with the estimate.

The rules are those of LyCORIS (Yeh et al., arXiv:2309.14859), so that the same settings give files
of the same shapes.
"""

from __future__ import annotations

import math


def split_width(width: int, factor: int | None = None) -> tuple[int, int]:
    """Return two numbers whose product is `width`, the smaller one first.

    Args:
        width: of a layer.
        factor: the smaller number is `factor` where that divides the width, else its largest
            divisor below; None: as near to the square root as can be.
    """
    if factor is not None and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    largest = math.isqrt(width) if factor is None else min(factor, math.isqrt(width))
    small = next(size for size in range(largest, 0, -1) if width % size == 0)
    return small, width // small


def lokr_shapes(
    inputs: int, outputs: int, rank: int, *, factor: int | None, decompose_both: bool
) -> dict[str, tuple[int, int]]:
    """Return the shapes of the tensors by name, in the order of W1 ⊗ W2.

    W2, the larger one, is a product of two factors unless the rank is half its larger side or
    more: then it is trained whole, which takes fewer numbers. So is W1, if it may be cut at all.
    """
    out_small, out_large = split_width(outputs, factor)
    in_small, in_large = split_width(inputs, factor)
    return {
        **_matrix("w1", out_small, in_small, rank if decompose_both else None),
        **_matrix("w2", out_large, in_large, rank),
    }


def _matrix(name: str, rows: int, columns: int, rank: int | None) -> dict[str, tuple[int, int]]:
    if rank is None or rank >= max(rows, columns) / 2:
        return {name: (rows, columns)}
    return {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
