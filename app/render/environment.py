"""The report on a machine as lines of text."""

from __future__ import annotations

from typing import Any


def report_lines(found: dict[str, Any]) -> list[str]:
    """Return what `domain.environment.report` has found, one fact a line."""
    lines = [
        f"menma      {found['menma']}",
        f"python     {found['python']} ({found['executable']})",
        f"system     {found['system']}, {found['cpus']} CPUs",
        f"RAM        {found['ram_gib']} GiB, {found['ram_free_gib']} GiB free",
        f"disk       {found['disk_free_gib']} GiB free in {found['disk_folder']}",
    ]
    lines += [
        f"GPU {gpu['index']}      {gpu['name']}, {gpu['vram_gib']} GiB, {gpu['vram_free_gib']} GiB "
        f"free, driver {gpu['driver']}, compute capability {gpu['compute_capability']}"
        for gpu in found["gpus"]
    ] or ["GPU        none"]
    for name, version in found["packages"].items():
        lines.append(f"{name:<14} {version or 'not installed'}")
    return lines
