"""`menma bench`: time and memory as ratios."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import jobs, output
from app.cli.options import command_app

app = command_app()


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks to run; left out: all.")
    ] = None,
) -> None:
    """Measure time and memory here.

    Results are JSON lines on stdout.
    """
    result = jobs.run("bench", {"names": names or []})
    for event in result.events:
        if event["type"] == "output":
            output.json_line(event)
    jobs.leave_if_failed(result)
