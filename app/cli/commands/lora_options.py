"""Arguments that several `menma lora` commands share, and how they show what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion, output
from app.cli.jobs import JobResult
from trainer.contract.errors import UserError

File = Annotated[Path, typer.Argument(help="LoRA in any known layout.", show_default=False)]
Uses = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE[:STRENGTH]",
        help="LoRAs and their strengths (1 when left out). Of a file for both experts of Wan 2.2 "
        "add @high_noise or @low_noise.",
        show_default=False,
    ),
]
Target = Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False)]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="comfy, kohya or peft; left out: that of the first file.",
        metavar="LAYOUT",
        autocompletion=completion.layouts,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="bf16, fp16 or fp32; left out: the files' own.",
        metavar="DTYPE",
        autocompletion=completion.dtypes,
    ),
]
Expert = Annotated[
    str | None,
    typer.Option(
        "--expert",
        metavar="EXPERT",
        help="high_noise or low_noise: the part of a file that holds both experts' LoRAs.",
        autocompletion=completion.experts,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Rank = Annotated[
    int | None, typer.Option("--rank", "-r", help="Largest rank of a module.", metavar="R")
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", help="Keep this share of the squared norm of each module.", metavar="E"
    ),
]
Frobenius = Annotated[
    float | None,
    typer.Option("--frobenius", help="Keep this share of the norm of each module.", metavar="F"),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio", help="Drop singular values below the largest one / RATIO.", metavar="RATIO"
    ),
]


def written_request(
    target: Path, layout: str | None, dtype: str | None, *, force: bool
) -> dict[str, Any]:
    """Return what every request says of its output.

    Raises:
        UserError: the file is there and `force` is not set.
    """
    refuse_existing(target, force=force)
    return {"output": str(target), "layout": layout, "dtype": dtype, "force": force}


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse to overwrite before a trainer is started.

    Raises:
        UserError: the file is there and `force` is not set.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists already", hint="choose another file, or add --force")


def show_written(result: JobResult, *, as_json: bool, many: bool = False) -> None:
    """Write the paths to stdout and the figures to stderr; with `as_json` all of it to stdout.

    Args:
        result: of the job.
        as_json: an object, or a list of one object a file.
        many: the command may write several files.
    """
    written = [_facts(event) for event in result.all("output")]
    if as_json:
        output.json_data(written if many else next(iter(written), {}))
        return
    for facts in written:
        output.data(str(facts["path"]))
        for line in _lines(facts):
            output.say(line)


def _facts(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in {"v", "time", "type"}}


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    if ranks := facts.get("ranks"):
        shown = ", ".join(f"{rank} ({count} modules)" for rank, count in list(ranks.items())[:8])
        lines.append(f"rank: {shown}{', …' if len(ranks) > 8 else ''}")
    if (energy := facts.get("energy")) is not None:
        lowest = next(iter((facts.get("energy_by_module") or {}).items()), None)
        worst = f"; least in {lowest[0]}: {100 * lowest[1]:.2f} %" if lowest else ""
        lines.append(f"energy kept: {100 * energy:.2f} %{worst}")
    if weights := facts.get("weights"):
        lines += [f"{part['file']}  {100 * part['weight']:.2f} %" for part in weights]
    if rounding := facts.get("rounding"):
        lines.append(
            f"rounding: {100 * rounding['update_error']:.2g} % of what was added, "
            f"{100 * rounding['weight_error']:.2g} % of the weights"
        )
    if unchanged := facts.get("unchanged"):
        lines.append(f"unchanged: {unchanged} linear layers")
    return lines
