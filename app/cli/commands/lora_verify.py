"""`menma lora verify`: prove that LoRA files do not write to the same matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion, jobs, output
from app.cli.exit_codes import ExitCode
from app.cli.options import Json
from trainer.contract.errors import UserError


def verify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="LoRA files.", show_default=False)
    ],
    expert: Annotated[
        str | None,
        typer.Option(
            "--expert",
            help="high_noise or low_noise: the part of files that hold both experts' LoRAs.",
            autocompletion=completion.experts,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that LoRAs are disjoint: no two change the same layer.

    Says which slots of LORAID are taken and free, which files overlap and where, and on what they
    disagree. Exit code 1 when they are not disjoint.

    Example: menma lora verify fish.safetensors rain.safetensors
    """
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        raise UserError(f"no such file: {', '.join(missing)}")
    request = {"paths": [str(path) for path in files], "expert": expert}
    result = jobs.run_or_leave("lora_verify", request, quiet=True)
    events, end = result.all("output"), result.end
    report = {
        "disjoint": bool(end["disjoint"]),
        "files": [event["file"] for event in events if "file" in event],
        "overlaps": [event["overlap"] for event in events if "overlap" in event],
        "disagreements": end["disagreements"],
        "free": end["free"],
    }
    if as_json:
        output.json_data(report)
    else:
        _show(report)
    if not report["disjoint"]:
        raise typer.Exit(ExitCode.FAILED)


def _show(report: dict[str, Any]) -> None:
    headers = ("FILE", "SLOT", "OF", "UNITS ARE", "ALLOCATION", "EXPERT", "LAYERS")
    rows = [
        (
            Path(file["path"]).name,
            ",".join(map(str, file["ids"] or ())),
            str(file["slots"] or ""),
            file["granularity"] or "",
            file["allocation"] or "",
            file["expert"] or "",
            str(file["num_modules"]),
        )
        for file in report["files"]
    ]
    output.data(output.table(headers, rows, right="SLOT OF LAYERS"))
    for file in report["files"]:
        for note in file["notes"]:
            output.say(f"{file['path']}: {note}")
        if file["num_outside"]:
            output.warn(
                f"{file['path']}: {file['num_outside']} layers are not of its slot: "
                f"{file['outside']}"
            )
    for subject, values in report["disagreements"].items():
        listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
        output.warn(f"the files disagree on {subject.replace('_', ' ')}: {listed}")
    for overlap in report["overlaps"]:
        mark = "shared" if overlap["shared"] else "OVERLAP"
        output.data(
            f"{mark}: {' and '.join(overlap['files'])}: {overlap['num_modules']} layers: "
            f"{overlap['where']}"
        )
    for expert, slots in (report["free"] or {}).items():
        name = "" if expert == "none" else f" ({expert} noise)"
        output.data(f"free slots{name}: {_runs(slots) or 'none'}")
    output.data("disjoint" if report["disjoint"] else "not disjoint")


def _runs(slots: list[int]) -> str:
    from trainer.contract.loraid import numbers_text

    return numbers_text(slots)
