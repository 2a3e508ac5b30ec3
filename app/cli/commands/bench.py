"""`menma bench`: time and memory, as ratios, of a config, or of a grid of configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.options import Json, Overrides, command_app
from trainer.contract.errors import RunError, UserError

app = command_app()

STEPS, WARMUP_STEPS = 3, 1
"""Of `contract.jobs.BenchConfigRequest`; a test keeps them equal."""
_OF_A_ROW = ("model", "clip", "settings", "status", "reason", "result", "slower_percent")
_OF_THE_EVENT = frozenset({"v", "time", "type", "reason"})


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…|CONFIG]",
            help="Benchmarks to run (left out: the usual ones), or one config file.",
        ),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Measure a fixed grid of configs, and print a markdown table."),
    ] = False,
    sampling: Annotated[
        bool,
        typer.Option("--sampling", help="With --grid: of sampling steps instead of training."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="WORD", help="With --grid: rows with this in them. Repeatable."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help=f"Steps that are timed ({STEPS}).", show_default=False),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            "--warmup-steps",
            min=0,
            help=f"Steps before them that do not count ({WARMUP_STEPS}).",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure time and memory here.

    Of a config: its training step on random weights and batches, beside the estimate. Needs no
    weights, caches or clips, only the config.

    By name: figures with limits, as JSON lines on stdout.

    Example: menma bench my.toml --set memory.blocks_to_swap=20
    """
    names = what or []
    config = next((name for name in names if _is_config(name)), None)
    counts = {
        "steps": STEPS if steps is None else steps,
        "warmup_steps": WARMUP_STEPS if warmup_steps is None else warmup_steps,
    }
    if grid:
        _refuse({"names or a config": names, "--set": overrides}, "--grid")
        request = {"only": only or [], "sampling": sampling, **counts}
        _bench_grid(request, as_json=as_json)
    elif config is not None:
        rest = {"--only": only, "--sampling": sampling or None}
        _refuse({"further names or configs": names[1:], **rest}, "a config")
        _bench_config(config, overrides or [], counts, as_json=as_json)
    else:
        given: dict[str, Any] = {
            "--only": only,
            "--sampling": sampling or None,
            "--set": overrides,
            "--steps": steps,
            "--json": as_json or None,
        }
        _refuse({**given, "--warmup-steps": warmup_steps}, "benchmarks by name")
        _bench_names(names)


def _is_config(text: str) -> bool:
    return text.endswith(".toml") or Path(text).is_file()


def _refuse(given: dict[str, Any], beside: str) -> None:
    """Refuse what has no meaning beside something else.

    Raises:
        UserError: something is given.
    """
    named = [name for name, value in given.items() if value is not None and value != []]
    if named:
        raise UserError(
            f"{' and '.join(named)} cannot go with {beside}",
            hint="one thing at a time: menma bench NAME…, menma bench CONFIG, or menma bench "
            "--grid; `menma bench --help` says which options each has",
        )


def _bench_names(names: Sequence[str]) -> None:
    result = jobs.run("bench", {"names": list(names)})
    for event in result.events:
        if event["type"] == "output":
            output.json_line(event)
    jobs.leave_if_failed(result)


def _bench_config(
    config: str, overrides: Sequence[str], counts: dict[str, int], *, as_json: bool
) -> None:
    from app.render import benchmarks
    from trainer.contract.config_io import load_config

    load_config(config, overrides)  # what is wrong, before torch is loaded
    request = {"config": config, "set": list(overrides), **counts}
    end = jobs.run_or_leave("bench_config", request, quiet=as_json).end
    if not end:
        raise RunError("the benchmark ended without a result")
    result = {key: value for key, value in end.items() if key not in _OF_THE_EVENT}
    if as_json:
        output.json_data(result)
        return
    table = output.table(benchmarks.HEADERS, benchmarks.rows(result), right="MEASURED ESTIMATE")
    output.data(table)
    for line in benchmarks.summary(result):
        output.say(line)


def _bench_grid(request: dict[str, Any], *, as_json: bool) -> None:
    from app.render import benchmarks

    found = jobs.run("bench_grid", request, quiet=as_json)
    rows = [{key: event[key] for key in _OF_A_ROW if key in event} for event in found.all("output")]
    known = {"device": found.end.get("device", ""), "torch": found.end.get("torch", "")}
    sampling = ["--sampling"] if request["sampling"] else []
    words = (f'--only "{word}"' for word in request["only"])
    command = " ".join(["menma bench --grid", *sampling, *words])
    if as_json:
        output.json_data({"command": command, **known, "rows": rows})
    elif rows:
        table = benchmarks.sampling_markdown if sampling else benchmarks.markdown
        for line in table(rows, **known, command=command):
            output.data(line)
    jobs.leave_if_failed(found)
