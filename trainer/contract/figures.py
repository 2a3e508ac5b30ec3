"""The figures of an event, under the names that TensorBoard, W&B and CSV files show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {"step": "train", "validation": "validation"}
_NOT_FIGURES = frozenset({"v", "time", "type", "step", "total_steps", "eta_s", "items", "seconds"})


def figures_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Return `train/…` of a step event and `validation/…` of a validation; of others nothing.

    What lies deeper is named by its path: `train/terms/loss`; a loss at one timestep is
    `validation/timestep_100`.
    """
    prefix = _KINDS.get(str(event.get("type")))
    if prefix is None or not isinstance(event.get("step"), int):
        return {}
    found: dict[str, float] = {}
    for name, value in event.items():
        if name in _NOT_FIGURES:
            continue
        if isinstance(value, Mapping):
            deeper = "timestep_" if name == "by_timestep" else f"{name}/"
            found |= {f"{prefix}/{deeper}{key}": v for key, v in value.items() if _is_number(v)}
        elif _is_number(value):
            found[f"{prefix}/{name}"] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
