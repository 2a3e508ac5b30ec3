"""State, figures and readings of a run in words."""

from __future__ import annotations

import math

from rich.text import Text

from app.runs.durations import duration
from app.runs.metrics import RunLog, Series
from app.runs.state import RunState

CURSOR_HINT = "left and right read single steps"
SHOWN = ("loss", "lr", "grad_norm")
"""What the cursor reads besides the series that was chosen."""


def state_words(state: RunState, share_read: float, bad_lines: int) -> Text:
    """Return what the run does, how far it is, and what is wrong with its log."""
    text = Text(f"{state.state.sign} {state.state.value}", style="bold", no_wrap=True)
    text.overflow = "ellipsis"
    parts = []
    if state.step is not None:
        of = f"/{state.total_steps}" if state.total_steps else ""
        parts.append(f"step {state.step}{of}")
    if state.state.is_live and state.estimating:
        parts.append("ETA estimating")
    elif state.state.is_live and state.eta_s:
        parts.append(f"{duration(state.eta_s)} left")
    if share_read < 1.0:
        parts.append(f"reading {share_read:.0%}")
    if state.why:
        parts.append(state.why)
    if bad_lines:
        lines = "1 line" if bad_lines == 1 else f"{bad_lines} lines"
        parts.append(f"{lines} of the events cannot be read")
    return text.append("".join(f"   {part}" for part in parts), style="not bold")


def figures(log: RunLog) -> Text:
    """Return the newest figures of a run in one line."""
    step = log.last_step
    validation = log.validation[-1][1] if log.validation else None
    shown = [
        ("loss", "{:.4f}", step.get("loss")),
        ("val", "{:.4f}", validation),
        ("lr", "{:.3g}", step.get("lr")),
        ("grad", "{:.3g}", step.get("grad_norm")),
        ("s/step", "{:.2f}", step.get("step_time_s")),
        ("peak VRAM", "{:.1f}G", step.get("peak_vram_gib")),
        ("RAM", "{:.1f}G", step.get("rss_gib")),
        ("epoch", "{:.2f}", step.get("epoch")),
        ("items/s", "{:.3g}", step.get("items_per_s")),
    ]
    words = [
        f"{name} {form.format(float(value))}"
        for name, form, value in shown
        if isinstance(value, int | float) and abs(value) < 1e300
    ]
    return Text("  ".join(words), no_wrap=True, overflow="ellipsis")


def series_line(name: str, series: Series) -> Text:
    """Return the name of a series and its newest value."""
    if not series.steps:
        return Text(f"{name}: nothing yet   m chooses another", style="dim")
    value = series.values[-1]
    words = f"{value:.6g}" if math.isfinite(value) else "none"
    text = Text(f"{name} {words} at step {series.steps[-1]}", no_wrap=True, overflow="ellipsis")
    return text.append("   m chooses another", style="dim")


def reading(log: RunLog, chosen: str, steps: tuple[int, int]) -> Text:
    """Return the exact figures of a step, and the range of the loss where a column has several.

    Args:
        log: what the run has told.
        chosen: the series of the lower curve; empty: none.
        steps: the first and the last step under the cursor.
    """
    loss = log.series("loss")
    found = loss.at(steps[1])
    if found is None:
        return Text(CURSOR_HINT, style="dim")
    step = found[0]
    words = [f"step {step}"]
    for name in dict.fromkeys([*SHOWN, *([chosen] if chosen else [])]):
        known = log.series(name).at(step)
        if known is not None and math.isfinite(known[1]):
            at = "" if known[0] == step else f" (step {known[0]})"
            words.append(f"{_label(name)} {known[1]:.6g}{at}")
    if steps[1] > steps[0]:
        place = loss.place(steps[0])
        values = [v for v in loss.values[place : loss.place(steps[1]) + 1] if math.isfinite(v)]
        if len(values) > 1:
            words.append(f"loss {min(values):.4g} to {max(values):.4g} in {len(values)} steps")
    return Text("   ".join(words), no_wrap=True, overflow="ellipsis")


def _label(name: str) -> str:
    return "gradient" if name == "grad_norm" else name
