"""Evaluations beside one another: a row a figure, a column a subject, the best of a row marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.runs.durations import duration

Result = Mapping[str, Any]
"""The figures of one subject, as the job `eval` gives them."""
Better = Literal["smaller", "larger", ""]
BEST = "*"
UNLIKE = "!"
SMALLER_IS_BETTER = ("error", "leak", "loss", "distance", "difference")
"""A probe's figure whose name ends so is better when smaller; all others when larger."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of all subjects."""

    name: str
    cells: tuple[str, ...]
    """As shown; the best one ends with `BEST`. Empty: the subject has no such figure."""
    comparable: bool = True
    """Whether all subjects were measured in the same way."""


def compare(results: Sequence[Result]) -> list[Row]:
    """Return the rows of the figures that at least one subject has."""
    rows = [
        row("step", results, lambda r: r["step"], str),
        row("trained parameters", results, lambda r: _at(r, "adapter", "parameters"), _count),
        row("output file, MiB", results, lambda r: _at(r, "adapter", "bytes"), _mib),
        *_validation_rows(results),
        *_probe_rows(results),
        *_cost_rows("training", results),
        *_cost_rows("evaluation", results),
    ]
    return [each for each in rows if any(each.cells)]


def better(figure: str) -> Better:
    """Tell which values of a probe's figure are better, by its name."""
    return "smaller" if figure.endswith(SMALLER_IS_BETTER) else "larger"


def labels(names: Sequence[str]) -> list[str]:
    """Return short names of subjects for the heads of columns, each once and without spaces."""
    short = [name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] for name in names]
    short = [name.removesuffix(".toml").replace(" ", "_") or "subject" for name in short]
    return [
        name if short.count(name) == 1 else f"{name}#{short[: place + 1].count(name)}"
        for place, name in enumerate(short)
    ]


def _validation_rows(results: Sequence[Result]) -> Iterator[Row]:
    alike = _same(_at(result, "validation", "fingerprint") for result in results)
    yield row("validation items", results, lambda r: _at(r, "validation", "items"), str)
    timesteps = {
        timestep: None
        for result in results
        for timestep in _at(result, "validation", "base", "by_timestep") or {}
    }
    parts: list[tuple[str, tuple[str, ...]]] = [("validation loss", ("loss",))]
    parts += [
        (f"  at timestep {timestep}", ("by_timestep", timestep))
        for timestep in sorted(timesteps, key=float)
    ]
    for name, keys in parts:
        for whose in ("base", "trained"):

            def loss(result: Result, whose: str = whose, keys: tuple[str, ...] = keys) -> Any:
                return _at(result, "validation", whose, *keys)

            # The base is not what the subjects compete with.
            wanted: Better = "smaller" if whose == "trained" else ""
            yield row(f"{name}, {whose}", results, loss, _loss, wanted, alike=alike)


def _probe_rows(results: Sequence[Result]) -> Iterator[Row]:
    alike = _same(
        None
        if result["probe"] is None
        else (result["probe"]["kind"], result["probe"]["fingerprint"])
        for result in results
    )
    names = {figure: None for result in results for figure in _at(result, "probe", "figures") or {}}
    for name in names:

        def figure(result: Result, name: str = name) -> Any:
            return _at(result, "probe", "figures", name)

        yield row(name, results, figure, _share, better(name), alike=alike)


def _cost_rows(what: str, results: Sequence[Result]) -> Iterator[Row]:
    kinds: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("time", "seconds", _time),
        ("peak VRAM, GiB", "peak_vram_gib", _gib),
        ("peak RAM, GiB", "peak_rss_gib", _gib),
    )
    for name, key, show in kinds:

        def cost(result: Result, key: str = key) -> Any:
            return _at(result, what, key)

        yield row(f"{what} {name}", results, cost, show, "smaller")


def row(
    name: str,
    results: Sequence[Result],
    value: Callable[[Result], Any],
    show: Callable[[Any], str],
    wanted: Better = "",
    *,
    alike: bool = True,
) -> Row:
    """Return the row of one figure.

    Args:
        name: of the figure.
        results: a subject each.
        value: takes the figure out of a subject; None: it has none.
        show: writes a value.
        wanted: which values are better; the best is marked.
        alike: whether all were measured in the same way; else none is marked.
    """
    values = [value(result) for result in results]
    cells = ["" if entry is None else show(entry) for entry in values]
    given = [entry for entry in values if entry is not None]
    if wanted and alike and len(set(cells) - {""}) > 1:
        best = show(min(given) if wanted == "smaller" else max(given))
        # By what is shown: of two that look alike, neither is better.
        cells = [f"{cell} {BEST}" if cell == best else cell and f"{cell}  " for cell in cells]
    return Row(name, tuple(cells), alike or len(given) < 2)


def _at(result: Result, *keys: str) -> Any:
    """Return the value below `keys`; None where there is none."""
    value: Any = result
    for key in keys:
        if value is None:
            return None
        value = value.get(key)
    return value


def _same(values: Iterator[Any]) -> bool:
    return len({value for value in values if value is not None}) < 2


def _loss(value: float) -> str:
    return f"{value:.5f}"


def _share(value: float) -> str:
    return f"{value:.4f}"


def _count(value: int) -> str:
    return f"{value:,}"


def _mib(value: int) -> str:
    return f"{value / 2**20:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _gib(value: float) -> str:
    return f"{value:.2f}"
