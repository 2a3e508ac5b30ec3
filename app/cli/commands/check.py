"""`menma check`: everything that is wrong, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from app.cli import jobs, output
from app.cli.exit_codes import ExitCode
from app.cli.options import Config, Json, Overrides, command_app
from trainer.contract.errors import ConfigError, Problem

if TYPE_CHECKING:
    from trainer.contract.config import RunConfig

app = command_app()


@app.command()
def check(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a config, model files and clips.

    Lists everything that is wrong at once; nothing is written.
    """
    from trainer.contract.config_io import load_config_with_sources

    try:
        checked = load_config_with_sources(config, overrides or (), jobs=("cache", "train")).config
    except ConfigError as error:
        if as_json:
            _report([_problem(problem) for problem in error.problems])
            raise typer.Exit(ExitCode.MISTAKE) from None
        raise
    request = {"config": str(config), "set": list(overrides or ())}
    result = jobs.run("check", request, quiet=as_json)
    if as_json:
        _report(
            [_from_event(event) for event in result.all("error")],
            [_from_event(event) for event in result.all("warning")],
            result.end,
        )
    jobs.leave_if_failed(result)
    if not as_json:
        _show_dataset(result.end)
        _show_estimate(checked, str(result.end.get("variant", "")))
        _show_caching(checked, result.end)
        output.say(f"{config} is fine. Next: menma cache {config}, then menma train {config}")


def _report(
    problems: list[dict[str, Any]],
    warnings: Sequence[dict[str, Any]] = (),
    end: Mapping[str, Any] | None = None,
) -> None:
    found = dict(end or {})
    output.json_data(
        {
            "ok": not problems,
            "problems": problems,
            "warnings": list(warnings),
            "variant": found.get("variant") or None,
            "clips": found.get("clips"),
            "validation_clips": found.get("validation_clips"),
            "validation_items": found.get("validation_items"),
            "batches_per_epoch": found.get("batches_per_epoch"),
            "experts": found.get("experts"),
            "buckets": found.get("buckets", []),
        }
    )


def _show_dataset(end: Mapping[str, Any]) -> None:
    if buckets := end.get("buckets"):
        rows = [(row["bucket"], str(row["items"]), str(row["tokens"])) for row in buckets]
        output.data(output.table(("BUCKET", "ITEMS", "TOKENS"), rows, right="ITEMS TOKENS"))
    held = ""
    if clips := end.get("validation_clips"):
        held = f" Validation: {clips} clips, {end.get('validation_items', 0)} items."
    output.say(
        f"Model: {end.get('variant') or 'not recognised'}. Clips: {end.get('clips', 0)}. "
        f"Batches an epoch: {end.get('batches_per_epoch', 0)}.{held}"
    )


def _show_estimate(config: RunConfig, variant: str) -> None:
    """Say whether this machine's GPU is large enough, where there is one."""
    from app.domain.cards import estimate_here
    from app.render.estimates import automatic_lines, verdict_line

    result = estimate_here(config, variant)
    if result is None:
        return
    for line in automatic_lines(result):
        output.say(line)
    line = f"{verdict_line(result)} More: menma estimate"
    if result.verdict == "fits":
        output.say(line)
    else:
        output.warn(line, hint="settings that fit: menma estimate CONFIG --fit")


def _show_caching(config: RunConfig, end: Mapping[str, Any]) -> None:
    """Say how long caching takes on this machine's GPU, where there is one."""
    from app.domain.cards import caching_here
    from app.render.estimates import caching_line
    from trainer.contract.memory_model import Clip

    rows = end.get("buckets", [])
    if not rows or len(rows) != end.get("num_buckets"):  # else not all are listed
        return
    windows: dict[Clip, int] = {}
    for row in rows:
        width, height, num_frames = map(int, row["bucket"].split("x"))
        windows[Clip(width=width, height=height, num_frames=num_frames)] = int(row["items"])
    captions = int(end.get("clips", 0)) + 1  # and the empty one
    found = caching_here(config, str(end.get("variant", "")), windows, captions)
    if found is not None:
        output.say(caching_line(*found))


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "message": problem.message,
        "key": problem.key,
        "file": str(problem.file) if problem.file is not None else None,
        "line": problem.line,
        "hint": problem.hint,
    }


def _from_event(event: dict[str, Any]) -> dict[str, Any]:
    file: Path | str | None = event.get("file")
    return {
        "message": event.get("message", ""),
        "key": event.get("key", ""),
        "file": str(file) if file is not None else None,
        "line": event.get("line"),
        "hint": event.get("hint", ""),
    }
