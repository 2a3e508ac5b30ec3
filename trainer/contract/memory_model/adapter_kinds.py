"""How many parameters a kind of adapter trains in one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _low_rank(options: Mapping[str, Any], inputs: int, outputs: int) -> int:
    return int(options.get("rank", 16)) * (inputs + outputs)


def _singlora(options: Mapping[str, Any], inputs: int, outputs: int) -> int:
    return int(options.get("rank", 16)) * max(inputs, outputs)


def _vera(options: Mapping[str, Any], inputs: int, outputs: int) -> int:
    return int(options.get("rank", 256)) + outputs


TRAINED_PARAMETERS: dict[str, Callable[[Mapping[str, Any], int, int], int]] = {
    "tlora": _low_rank,
    "singlora": _singlora,
    "relora": _low_rank,
    "ggpo": _low_rank,
    "vera": _vera,
}
"""Kind -> f(options, input width, output width). A test compares each with the real layer."""
