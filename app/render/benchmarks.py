"""What benchmarks measured, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "-"
HEADERS = ("FIGURE", "MEASURED", "ESTIMATE", "ERROR")
GRID_HEADERS = (
    "model", "clip", "settings", "s/step", "MFU", "peak, GiB", "estimate, GiB", "error",
)  # fmt: skip
SAMPLING_HEADERS = (
    "model", "clip", "settings", "s/step", "s/video", "by swapping", "MFU", "peak, GiB",
    "estimate, GiB", "error",
)  # fmt: skip


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the table of one config; a figure that this machine does not give is `-`."""
    step, memory, estimate = result["step_s"], result["memory_gib"], result["estimate"]
    error, tflop = result["error_percent"], result["tflop"]
    return [
        (
            "step, s",
            _number(step["median"]),
            _number(estimate["step_s"]),
            _percent(error["step_s"]),
        ),
        ("  fastest, s", _number(step["min"]), "", ""),
        ("  slowest, s", _number(step["max"]), "", ""),
        ("warm-up, s", _number(sum(result["warmup_s"])), "", ""),
        (
            "peak VRAM reserved, GiB",
            _number(memory["peak_reserved"]),
            _number(estimate["peak_gib"]),
            _percent(error["peak"]),
        ),
        ("  allocated, GiB", _number(memory["peak_allocated"]), "", ""),
        ("peak RAM of a process, GiB", _number(memory["peak_host"]), "", ""),
        ("TFLOP a step, needed", "", _number(tflop["needed"]), ""),
        ("  computed", "", _number(tflop["computed"]), ""),
        ("TFLOP/s", _number(result["tflop_per_s"]), "", ""),
        ("MFU", _share(result["mfu"]), "", ""),
    ]


def summary(result: Mapping[str, Any]) -> list[str]:
    """Return what was measured on what, in words."""
    batch = f", {result['batch']} clips a batch" if result["batch"] > 1 else ""
    processes = f", {result['world_size']} processes" if result["world_size"] > 1 else ""
    lines = [
        f"{result['variant']}, {result['clip']} ({result['tokens']:,} tokens){batch}; random "
        f"weights, {result['engine']} engine{processes}, {result['device']}, "
        f"torch {result['torch']}, {result['step_s']['steps']} steps"
    ]
    if result["memory_gib"]["peak_reserved"] is None:
        lines.append(
            "On a CPU there is no VRAM to measure, and no step time to compare with: the estimate "
            "is of a GPU."
        )
    elif result["estimate"]["step_s"] is None:
        lines.append(f"The speed of {result['device']} is not known: no time to compare with.")
    return lines


def markdown(
    grid: Sequence[Mapping[str, Any]], *, device: str, torch: str, command: str
) -> list[str]:
    """Return the grid as lines of markdown, with what it was measured on."""
    lines = [f"`{command}` on {device}, torch {torch}; LoRA of rank 32, one clip a step."]
    if device == "cpu":
        lines.append("Tiny shapes, for there is no GPU: nothing here says how fast a model is.")
    return [*lines, "", *_table(GRID_HEADERS, map(_grid_row, grid))]


def sampling_markdown(
    grid: Sequence[Mapping[str, Any]], *, device: str, torch: str, command: str
) -> list[str]:
    """Return the grid of sampling as lines of markdown, with what it was measured on."""
    lines = [
        f"`{command}` on {device}, torch {torch}; two evaluations a step, no LoRA; the seconds of "
        f"a video are those of a step times its steps, without text encoder and VAE."
    ]
    if device == "cpu":
        lines.append("Tiny shapes, for there is no GPU: nothing here says how fast a model is.")
    return [*lines, "", *_table(SAMPLING_HEADERS, map(_sampling_row, grid))]


def _sampling_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    head = (row["model"], row["clip"], row["settings"])
    result = row["result"]
    if result is None:
        return (*head, f"{row['status']}: {row['reason']}", *[""] * 6)
    return (
        *head,
        _number(result["step_s"]["median"]),
        f"{_number(result['video_s'])} ({result['video_steps']} steps)",
        _percent(row.get("slower_percent")),
        _share(result["mfu"]),
        _number(result["memory_gib"]["peak_reserved"]),
        _number(result["estimate"]["peak_gib"]),
        _percent(result["error_percent"]["peak"]),
    )


def _grid_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    head = (row["model"], row["clip"], row["settings"])
    result = row["result"]
    if result is None:
        return (*head, f"{row['status']}: {row['reason']}", *[""] * 4)
    return (
        *head,
        _number(result["step_s"]["median"]),
        _share(result["mfu"]),
        _number(result["memory_gib"]["peak_reserved"]),
        _number(result["estimate"]["peak_gib"]),
        _percent(result["error_percent"]["peak"]),
    )


def _table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    cells = [headers, ["---"] * len(headers), *lines]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in cells]


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:+.1f} %"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"
