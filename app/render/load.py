"""Meters of GPUs and RAM as lines of text."""

from __future__ import annotations

from app.domain.load import GpuLoad, Load
from app.render.bar import bar

WIDTH = 20
COMPACT = "  "


def gpu_lines(load: Load, width: int, most: int) -> list[str]:
    """Return the GPUs, one a line; where there is no room for that, in short and in one line.

    Args:
        load: what was seen.
        width: characters of a line.
        most: lines that there is room for.
    """
    if not load.gpus:
        return [f"GPU   none: {load.no_gpu}"]
    if len(load.gpus) <= most:
        return [_gpu_line(gpu) for gpu in load.gpus]
    line, left = "GPU GiB", len(load.gpus)
    for gpu in load.gpus:
        part = f" {gpu.index}: {_memory(gpu).removesuffix(' GiB')} {_busy(gpu)}".rstrip()
        rest = f" +{left - 1} more" if left > 1 else ""
        if len(line) + len(part) + len(rest) > width:
            return [f"{line} +{left} more"]
        line += part + COMPACT[1:]
        left -= 1
    return [line.rstrip()]


def ram_line(load: Load) -> str:
    """Return the RAM of the machine, and what of it the run's processes hold."""
    share = load.ram_used_gib / load.ram_total_gib if load.ram_total_gib else 0.0
    line = f"RAM   {bar(share, WIDTH)}  {load.ram_used_gib:.1f}/{load.ram_total_gib:.1f} GiB"
    if load.run_gib is not None:
        line += f"  run {load.run_gib:.1f} GiB"
    if load.elsewhere:
        line += f"  (of this machine; the run is on {load.elsewhere})"
    return line


def _gpu_line(gpu: GpuLoad) -> str:
    parts = [f"GPU {gpu.index}"]
    if gpu.used_gib is not None and gpu.total_gib:
        parts.append(f"{bar(gpu.used_gib / gpu.total_gib, WIDTH)} ")
    parts += [_memory(gpu), "", f"{_busy(gpu)} busy" if _busy(gpu) else ""]
    if gpu.celsius is not None:
        parts.append(f" {gpu.celsius:.0f} C")
    if gpu.watts is not None:
        parts.append(f" {gpu.watts:.0f} W")
    return " ".join(parts)


def _memory(gpu: GpuLoad) -> str:
    if gpu.used_gib is None:
        return "memory not told"
    return f"{gpu.used_gib:.1f}" + (f"/{gpu.total_gib:.1f} GiB" if gpu.total_gib else " GiB")


def _busy(gpu: GpuLoad) -> str:
    return "" if gpu.busy_percent is None else f"{gpu.busy_percent:.0f} %"
