"""`menma eval`: what a training has brought, in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion, jobs, output
from app.cli.exit_codes import ExitCode
from app.cli.options import Json, Overrides, command_app
from trainer.contract.errors import MenmaError

app = command_app()

FIELDS = (
    "name", "config", "run", "variant", "expert", "output", "step", "adapter", "training",
    "validation", "probe", "evaluation", "notes",
)  # fmt: skip
"""Keys of a subject in the order of the JSON; `subject` comes before them, `error` after."""


@app.command("eval")
def evaluate(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG|RUN…",
            help="Configs, or runs (their folder, or their name in runs/).",
            show_default=False,
            autocompletion=completion.configs_or_runs,
        ),
    ],
    overrides: Overrides = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Folder for the videos that are judged, one below it each."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure runs, and compare them.

    Validation loss of the base and of what was trained, the figures of the config's [probe] on
    generated videos, time and memory. A run is measured with its newest output file; a config with
    that of its run, or the base alone. Several subjects make one table.

    Example: menma eval runs/rank-8 runs/rank-32
    """
    from app.domain.comparison import labels

    heads = labels([str(subject) for subject in subjects])
    results = []
    for head, subject in zip(heads, subjects, strict=True):
        if len(subjects) > 1:
            output.title(head)
        folder = None if save is None else save / head
        results.append(_evaluate(subject, overrides or [], folder, quiet=as_json))
    if as_json:
        output.json_data(results)
    else:
        _show(heads, results)
    code = _exit_code([result["error"] for result in results])
    if code != ExitCode.DONE:
        raise typer.Exit(code)


def _evaluate(
    subject: Path, overrides: Sequence[str], save: Path | None, *, quiet: bool
) -> dict[str, Any]:
    """Return the figures of one subject, or why there are none; the reason is said, too."""
    from app.cli.subjects import config_and_run
    from app.domain.complete import complete_config

    try:
        config, run_dir = config_and_run(subject)
        complete_config(config, overrides, "eval")  # what is wrong, before torch is loaded
    except MenmaError as error:
        output.show_error(error)
        return _failed(subject, error.message, error.hint, error.exit_code)
    request = {
        "config": str(config),
        "set": list(overrides),
        "run_dir": None if run_dir is None else str(run_dir),
        "save": None if save is None else str(save),
    }
    result = jobs.run("eval", request, quiet=quiet)
    if result.exit_code == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if result.exit_code != ExitCode.DONE:
        told = next(reversed(result.all("error")), {})
        message = str(told.get("message") or f"the job ended with exit code {result.exit_code}")
        return _failed(subject, message, str(told.get("hint", "")), result.exit_code)
    return {
        "subject": str(subject),
        **{field: result.end.get(field) for field in FIELDS},
        "error": None,
    }


def _failed(subject: Path, message: str, hint: str, code: int) -> dict[str, Any]:
    error = {"message": message, "hint": hint, "exit_code": int(code)}
    return {"subject": str(subject), **dict.fromkeys(FIELDS), "error": error}


def _exit_code(errors: Sequence[Mapping[str, Any] | None]) -> int:
    """Return 0; 1 when something failed; 2 (or another one) when all failed for that reason."""
    codes = {ExitCode.DONE if error is None else int(error["exit_code"]) for error in errors}
    return codes.pop() if len(codes) == 1 else ExitCode.FAILED


def _show(heads: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    from app.domain.comparison import BEST, UNLIKE, compare

    measured = [
        (head, result)
        for head, result in zip(heads, results, strict=True)
        if result["error"] is None
    ]
    if not measured:
        return
    for head, result in measured:
        files = result["output"] or []
        for file in [files] if isinstance(files, str) else files:
            output.say(f"{head}: {file}")
        for note in result["notes"] or ():
            output.say(f"{head}: {note}")
    rows = compare([result for _, result in measured])
    names = [head for head, _ in measured]
    cells = [(row.name + ("" if row.comparable else f" {UNLIKE}"), *row.cells) for row in rows]
    output.data(output.table(("FIGURE", *names), cells, right=" ".join(names)))
    if any(BEST in cell for row in rows for cell in row.cells):
        output.say(f"{BEST} best of its row")
    if not all(row.comparable for row in rows):
        output.say(
            f"{UNLIKE} not comparable: measured on different items, timesteps or noise, or with "
            "different prompts, seeds or settings of the samples"
        )
