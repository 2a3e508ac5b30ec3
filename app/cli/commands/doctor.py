"""`menma doctor`: is this machine ready."""

from __future__ import annotations

from pathlib import Path

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
    from app.render.environment import report_lines

    found = report(Path.cwd())
    if as_json:
        output.json_data(found)
    else:
        for line in report_lines(found):
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
