"""Runs beside one another: their curves, their figures, and what differs in their configs."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from app.domain.comparison import Row, labels, row
from app.domain.presets import flatten
from app.runs.durations import duration
from app.runs.metrics import RunLog, Series
from app.runs.state import RunState, read_state
from trainer.contract.config_io import load_config_with_sources
from trainer.contract.errors import ConfigError
from trainer.contract.run_dir import RunDir

SMOOTHING = 0.98
"""Of the average that the table's training loss is: about the last 50 steps."""
WARM_UP = 50
"""The average's first values are of few steps still: the smallest one is looked for after them."""
SAME_TASK = ("model", "dataset", "objective")
"""Sections that must be the same for training losses to be comparable."""
SAME_VALIDATION = ("model.variant", "dataset", "validation")
"""The same for validation losses."""
HARMLESS = frozenset({"num_repeats", "cache_directory", "strict", "batch_size"})
"""Keys of these sections that change neither loss."""
HARMLESS_TO_VALIDATION = HARMLESS | {"every_steps", "every_epochs", "at_start"}
MIB = 2**20


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """What a run has told, for a comparison."""

    label: str
    state: RunState
    loss: Series
    """The training loss of each step."""
    validation: Sequence[tuple[int, float]]
    figures: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    """`section.key` -> value, with all defaults filled in."""
    note: str = ""
    """What is wrong with its files; empty: nothing."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        validation = [[step, _known(loss)] for step, loss in self.validation]
        return {
            **self.state.to_json(),
            "figures": dict(self.figures),
            "validation": validation,
            "note": self.note,
        }


def read_runs(runs: Sequence[RunDir]) -> list[ComparedRun]:
    """Read all that the runs have told, and their configs. It takes a second for 100,000 steps."""
    heads = labels([run.root.name for run in runs])
    configs = _configs(runs)
    return [_read(*each) for each in zip(runs, heads, configs, strict=True)]


def figure_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return the figures that at least one run has, the best of a row marked."""
    figures = [run.figures for run in runs]
    task = _alike(runs, SAME_TASK, HARMLESS)
    validation = _alike(runs, SAME_VALIDATION, HARMLESS_TO_VALIDATION)
    rows = [
        row("state", figures, lambda f: f["state"], str),
        row("step", figures, lambda f: f["step"], str),
        _loss_row("loss, average at the end", figures, "loss", alike=task),
        _loss_row("loss, best average", figures, "best_loss", alike=task),
        row("  at step", figures, lambda f: f["best_loss_step"], str),
        _loss_row("validation, last", figures, "validation", alike=validation),
        _loss_row("validation, best", figures, "best_validation", alike=validation),
        row("  at step", figures, lambda f: f["best_validation_step"], str),
        row("s/step, median", figures, lambda f: f["step_time_s"], _number(3), "smaller"),
        row("peak VRAM, GiB", figures, lambda f: f["peak_vram_gib"], _number(2), "smaller"),
        row("peak RAM, GiB", figures, lambda f: f["peak_rss_gib"], _number(2), "smaller"),
        row("time", figures, lambda f: f["seconds"], duration),
        row("output, MiB", figures, lambda f: f["output_mib"], _number(1)),
    ]
    return [each for each in rows if any(each.cells)]


def config_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the options that differ: `section.key`, and how each run has it; `-`: it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    found = []
    for key in keys:
        values = tuple(_written(run.config, key) for run in runs)
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def _read(run: RunDir, head: str, config: tuple[dict[str, Any], str]) -> ComparedRun:
    log = RunLog(run)
    log.read()
    state = read_state(run)
    notes = [config[1]] if config[1] else []
    if log.bad_lines:
        notes.append(f"{log.bad_lines} lines of the events cannot be read")
    if not log.steps:
        notes.append("it has made no step")
    return ComparedRun(
        label=head,
        state=state,
        loss=log.series("loss"),
        validation=tuple(log.validation),
        figures=_figures(run, log, state),
        config=config[0],
        note="; ".join(notes),
    )


def _figures(run: RunDir, log: RunLog, state: RunState) -> dict[str, Any]:
    averages = list(_averages(log))
    settled = averages[WARM_UP:] or averages[-1:]
    last = averages[-1] if averages else None
    best = min(settled, key=_second) if settled else None
    measured = [(step, loss) for step, loss in log.validation if math.isfinite(loss)]
    lowest = min(measured, key=_second) if measured else None
    times = sorted(t for t in log.series("step_time_s").values if math.isfinite(t))
    return {
        "state": state.state.value,
        "step": log.steps[-1] if log.steps else state.step,
        "loss": last[1] if last else None,
        "best_loss": best[1] if best else None,
        "best_loss_step": best[0] if best else None,
        "validation": measured[-1][1] if measured else None,
        "best_validation": lowest[1] if lowest else None,
        "best_validation_step": lowest[0] if lowest else None,
        "step_time_s": times[len(times) // 2] if times else None,
        "peak_vram_gib": _largest(log, "peak_vram_gib"),
        "peak_rss_gib": _peak_rss(run) or _largest(log, "rss_gib"),
        "seconds": state.ended - state.started if state.started and state.ended else None,
        "output_mib": _output_mib(run),
    }


def _averages(log: RunLog) -> Iterator[tuple[int, float]]:
    series = log.series("loss")
    average = correction = 0.0
    for step, value in zip(series.steps, series.values, strict=True):
        if math.isfinite(value):
            average = SMOOTHING * average + (1 - SMOOTHING) * value
            correction = SMOOTHING * correction + (1 - SMOOTHING)
            yield step, average / correction


def _second(pair: tuple[int, float]) -> float:
    return pair[1]


def _largest(log: RunLog, name: str) -> float | None:
    values = [value for value in log.series(name).values if math.isfinite(value)]
    return max(values, default=None)


def _peak_rss(run: RunDir) -> float | None:
    try:
        value = json.loads(run.peaks.read_text(encoding="utf-8"))["peak_rss_gib"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def _output_mib(run: RunDir) -> float | None:
    """Return the size of the newest output file of a run."""
    found: list[tuple[float, int]] = []
    for file in run.output.glob("*.safetensors"):
        try:
            status = file.stat()
        except OSError:  # taken away just now
            continue
        found.append((status.st_mtime, status.st_size))
    return max(found)[1] / MIB if found else None


def _configs(runs: Sequence[RunDir]) -> list[tuple[dict[str, Any], str]]:
    """Return the configs with all defaults, and what is wrong with each.

    Where one cannot be completed, all are compared as they stand in their files.
    """
    complete = [_complete(run) for run in runs]
    if all(values is not None for values, _ in complete):
        return [(values or {}, "") for values, _ in complete]
    return [_as_written(run, problem) for run, (_, problem) in zip(runs, complete, strict=True)]


def _complete(run: RunDir) -> tuple[dict[str, Any] | None, str]:
    try:
        loaded = load_config_with_sources(run.config, environ={})
    except (ConfigError, OSError) as error:
        return None, str(error).partition("\n")[0]
    return flatten(loaded.config.model_dump(mode="json", exclude_none=True)), ""


def _as_written(run: RunDir, problem: str) -> tuple[dict[str, Any], str]:
    note = f"defaults are not compared: {problem}" if problem else ""
    try:
        return flatten(tomllib.loads(run.config.read_text(encoding="utf-8"))), note
    except (OSError, ValueError) as error:
        return {}, f"its config cannot be read: {error}"


def _alike(runs: Sequence[ComparedRun], sections: Sequence[str], ignored: Set[str]) -> bool:
    """Tell whether nothing in the sections differs but keys that are ignored."""
    return not any(
        key == section or key.startswith((f"{section}.", f"{section}["))
        for key, _ in config_rows(runs)
        if key.rpartition(".")[2] not in ignored
        for section in sections
    )


def _loss_row(name: str, figures: Sequence[Mapping[str, Any]], key: str, *, alike: bool) -> Row:
    return row(name, figures, lambda f: f[key], _number(5), "smaller", alike=alike)


def _number(places: int) -> Any:
    return lambda value: f"{value:.{places}f}"


def _written(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "-"
    value = config[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
