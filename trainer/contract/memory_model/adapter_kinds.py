"""What a kind of adapter trains in one linear layer, and what it holds beside that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Options = Mapping[str, Any]
Sizes = tuple[int, int]
"""Inputs and outputs of a linear layer."""


def _low_rank(options: Options, inputs: int, outputs: int) -> int:
    return int(options.get("rank", 16)) * (inputs + outputs)


def _singlora(options: Options, inputs: int, outputs: int) -> int:
    return int(options.get("rank", 16)) * max(inputs, outputs)


def _vera(options: Options, inputs: int, outputs: int) -> int:
    return int(options.get("rank", 256)) + outputs


TRAINED_PARAMETERS: dict[str, Callable[[Options, int, int], int]] = {
    "tlora": _low_rank,
    "singlora": _singlora,
    "relora": _low_rank,
    "ggpo": _low_rank,
    "vera": _vera,
}
"""Kind -> f(options, input width, output width). A test compares each with the real layer."""


def _relora_held(options: Options, layers: Sequence[tuple[Options, Sizes]]) -> int:
    """The frozen part, where it has a limit; it grows by the trained part a cycle else."""
    rank = int(options.get("frozen_max_rank") or 0)
    return sum(rank * (inputs + outputs) for _, (inputs, outputs) in layers)


def _ggpo_held(options: Options, layers: Sequence[tuple[Options, Sizes]]) -> int:
    """Two norms of each row."""
    return sum(2 * outputs for _, (_, outputs) in layers)


def _vera_held(options: Options, layers: Sequence[tuple[Options, Sizes]]) -> int:
    """One matrix for each width at each end."""
    widths = {i for _, (i, _) in layers}, {o for _, (_, o) in layers}
    return int(options.get("rank", 256)) * sum(map(sum, widths))


HELD: dict[str, Callable[[Options, Sequence[tuple[Options, Sizes]]], int]] = {
    "relora": _relora_held,
    "ggpo": _ggpo_held,
    "vera": _vera_held,
}
"""Float32 elements that are kept on the GPU and not trained, of all layers together, given the
adapter's options and each layer's own. What is not in the table holds nothing."""
