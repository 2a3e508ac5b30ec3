"""Memory of optimizers: their state, and what an update takes for a moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerMemory:
    """Bytes a trained element."""

    state: float
    temporary: float = 0.0


OPTIMIZERS: dict[str, OptimizerMemory] = {
    # Two moments, float32; the fused kernel needs nothing more.
    "adamw": OptimizerMemory(state=8.0),
    # Two moments of one byte, and for every 256 of them one float32 each.
    "adamw8bit": OptimizerMemory(state=2.0 + 8.0 / 256),
}


def optimizer_memory(kind: str) -> OptimizerMemory:
    """Return the figures of an optimizer; one that is not in the table counts as AdamW."""
    return OPTIMIZERS.get(kind, OPTIMIZERS["adamw"])
