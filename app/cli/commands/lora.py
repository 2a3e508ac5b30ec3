"""`menma lora`: tools on LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.commands.lora_targets import targets
from app.cli.commands.lora_verify import verify
from app.cli.options import Json, command_app
from trainer.contract.errors import UserError

app = command_app(help="Tools on LoRA files.")
app.command()(targets)
app.command()(verify)

Expert = Annotated[
    str | None,
    typer.Option(
        "--expert",
        help="high_noise or low_noise: the part of a file that holds both experts' LoRAs.",
    ),
]


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="LoRA in any known layout.", show_default=False)],
    expert: Expert = None,
    as_json: Json = False,
) -> None:
    """Show what a LoRA file holds: layout, rank, alpha, size of its updates, metadata."""
    result = jobs.run_or_leave("inspect", {"path": str(file), "expert": expert}, quiet=True)
    summary: dict[str, Any] = next(
        (event["lora"] for event in result.all("output") if "lora" in event), {}
    )
    if as_json:
        output.json_data(summary)
        return
    for line in _lines(summary):
        output.data(line)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="LoRA in any known layout.", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write.", show_default=False)
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="comfy (ComfyUI, diffusers), kohya (musubi-tuner) or peft (diffusers).",
        ),
    ] = "comfy",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bf16, fp16 or fp32; left out: the file's own."),
    ] = None,
    expert: Expert = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Rewrite a LoRA in another layout."""
    if target.exists() and not force:
        raise UserError(f"{target} exists already", hint="choose another file, or add --force")
    request = {
        "input": str(source),
        "output": str(target),
        "layout": layout,
        "dtype": dtype,
        "expert": expert,
        "force": force,
    }
    for path in jobs.run_or_leave("convert", request).paths:
        output.data(path)


def _lines(summary: dict[str, Any]) -> list[str]:
    """Lay a summary out for people."""
    shown = [
        ("file", summary.get("path")),
        ("size", _megabytes(summary.get("size_bytes"))),
        ("layout", summary.get("layout")),
        ("fits", ", ".join(summary.get("variants") or []) or summary.get("model")),
        ("expert", summary.get("expert")),
        ("modules", summary.get("num_modules")),
        ("parameters", _thousands(summary.get("num_parameters"))),
        ("rank", _counts(summary.get("ranks"))),
        ("alpha", _counts(summary.get("alphas"))),
        ("dtype", _counts(summary.get("dtypes"))),
        ("norm", _figure(summary.get("norm"))),
    ]
    lines = [f"{name:<12}{value}" for name, value in shown if value not in (None, "")]
    if zero := summary.get("zero_modules"):
        lines.append(f"{'untrained':<12}{zero} modules change nothing")
    lines += [f"{'largest':<12}{name}  {norm:.4g}" for name, norm in _items(summary, "largest")]
    lines += [f"{'note':<12}{note}" for note in summary.get("notes") or []]
    lines += [f"{key} = {value}" for key, value in sorted(_items(summary, "metadata"))]
    return lines


def _items(summary: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    return list((summary.get(key) or {}).items())


def _counts(counts: dict[str, int] | None) -> str:
    if not counts:
        return ""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} modules)" for value, count in counts.items())


def _megabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.1f} MiB"


def _thousands(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
