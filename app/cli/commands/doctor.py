"""`menma doctor`: is this machine ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from app.cli import output
from app.cli.exit_codes import ExitCode
from app.cli.options import Json, command_app

app = command_app()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show whether this machine is ready.

    Versions, GPUs, memory, disk and what is missing; good to paste in a bug report.
    """
    from app.domain.environment import report

    found = report(Path.cwd())
    if as_json:
        output.json_data(found)
    else:
        for line in _lines(found):
            output.data(line)
    if not as_json:
        for warning in found["warnings"]:
            output.warn(warning)
        for problem in found["problems"]:
            output.say(f"error: {problem}")
    if found["problems"]:
        raise typer.Exit(ExitCode.FAILED)
    if not as_json:
        output.say("Ready. `menma demo` shows the whole way on a tiny model.")


def _lines(found: dict[str, Any]) -> list[str]:
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
