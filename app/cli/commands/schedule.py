"""`menma schedule`: the learning rate of a config, drawn."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.options import Config, Json, Overrides, command_app

app = command_app()

_HEIGHT = 10
_WIDEST = 100


@app.command()
def schedule(
    config: Config,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Of a run of so many steps."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Draw the learning rate of a config over its steps.

    With warm-up, restarts of ReLoRA and both experts of Wan 2.2; nothing is loaded or written.
    """
    request: dict[str, Any] = {"config": str(config), "set": list(overrides or ())}
    if steps is not None:
        request["steps"] = steps
    end = jobs.run_or_leave("schedule", request, quiet=as_json).end
    if as_json:
        output.json_data({"kind": end.get("kind"), "courses": end.get("courses", [])})
        return
    for course in end.get("courses", []):
        _show(course)


def _show(course: dict[str, Any]) -> None:
    from app.render import courses

    points = [(int(step), float(rate)) for step, rate in course["points"]]
    if expert := course["expert"]:
        output.title(f"{expert}, {course['steps']} steps")
    for line in courses.drawing(points, min(output.width(), _WIDEST), _HEIGHT):
        output.data(line)
    rows = courses.rows(points, int(course["warmup_steps"]), int(course["steps"]))
    output.data(output.table(("STEP", "LEARNING RATE"), rows, right="STEP"))
