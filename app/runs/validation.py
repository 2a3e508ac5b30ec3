"""The validation loss of a run over its steps, from the event log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.contract.events import EventReader
from trainer.contract.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class ValidationPoint:
    """One measurement."""

    step: int
    loss: float
    by_timestep: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"step": self.step, "loss": self.loss, "by_timestep": self.by_timestep}


def validation_curve(run: RunDir) -> list[ValidationPoint]:
    """Return the measurements by step; of a step done again after a resume, the last one."""
    points = {
        event["step"]: ValidationPoint(event["step"], event["loss"], event.get("by_timestep") or {})
        for event in EventReader(run.events).read()
        if event["type"] == "validation"
        and isinstance(event.get("step"), int)
        and isinstance(event.get("loss"), int | float)
    }
    return [points[step] for step in sorted(points)]


def curve_words(curve: list[ValidationPoint]) -> str:
    """Return the latest and the best measurement as words; empty for an empty curve."""
    if not curve:
        return ""
    last = curve[-1]
    best = min(curve, key=lambda point: point.loss)
    words = f"{last.loss:.4f} at step {last.step}"
    if best is last:
        return f"{words}, the best so far"
    return f"{words}, best {best.loss:.4f} at step {best.step}"
