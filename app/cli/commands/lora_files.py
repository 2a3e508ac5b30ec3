"""`menma lora inspect` and `convert`: what a file is, and the same in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion, jobs, output
from app.cli.commands.lora_options import Dtype, Expert, File, Force, refuse_existing, show_written
from app.cli.options import Json


def inspect(file: File, expert: Expert = None, as_json: Json = False) -> None:
    """Show kind, rank and norms of a LoRA file, and what loads it."""
    result = jobs.run_or_leave("inspect", {"path": str(file), "expert": expert}, quiet=True)
    summary: dict[str, Any] = next(
        (event["lora"] for event in result.all("output") if "lora" in event), {}
    )
    if as_json:
        output.json_data(summary)
        return
    for line in _lines(summary):
        output.data(line)


def convert(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
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
            autocompletion=completion.layouts,
        ),
    ] = "comfy",
    dtype: Dtype = None,
    expert: Expert = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split", help="Write a file with both experts as two, OUT_high_noise and …_low_noise."
        ),
    ] = False,
    join: Annotated[
        Path | None,
        typer.Option("--join", metavar="FILE", help="The other expert's LoRA: one file with both."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rewrite a LoRA in another layout; the update stays the same."""
    if not split:
        refuse_existing(target, force=force)
    request = {
        "input": str(source),
        "output": str(target),
        "layout": layout,
        "dtype": dtype,
        "expert": expert,
        "split": split,
        "join": None if join is None else str(join),
        "force": force,
    }
    show_written(jobs.run_or_leave("convert", request), as_json=as_json, many=True)


def _lines(summary: dict[str, Any]) -> list[str]:
    """Lay a summary out for people."""
    shown = [
        ("file", summary.get("path")),
        ("size", _megabytes(summary.get("size_bytes"))),
        ("layout", summary.get("layout")),
    ]
    pair = summary.get("pair")
    lines = _pairs(shown)
    for expert, part in (pair or {"": summary}).items():
        lines += ["", expert] if expert else []
        lines += _part_lines(part)
    lines += [""] if pair else []
    lines += [f"{'note':<12}{note}" for note in summary.get("notes") or []]
    lines += [f"{key} = {value}" for key, value in sorted(_items(summary, "metadata"))]
    return lines


def _part_lines(part: dict[str, Any]) -> list[str]:
    lines = _pairs(
        [
            ("kind", part.get("kind")),
            ("fits", ", ".join(part.get("variants") or []) or part.get("model")),
            ("expert", part.get("expert")),
            ("modules", part.get("num_modules")),
            ("parameters", _thousands(part.get("num_parameters"))),
            ("rank", _counts(part.get("ranks"))),
            ("alpha", _counts(part.get("alphas"))),
            ("dtype", _counts(part.get("dtypes"))),
            ("norm", _figure(part.get("norm"))),
        ]
    )
    lines += _differences(part.get("differences") or {})
    if zero := part.get("zero_modules"):
        lines.append(f"{'untrained':<12}{zero} modules change nothing")
    lines += [f"{'largest':<12}{name}  {norm:.4g}" for name, norm in _items(part, "largest")]
    by_block = [f"{block}: {norm:.3g}" for block, norm in _items(part, "norm_by_block")]
    for start in range(0, len(by_block), 5):
        lines.append(
            f"{'by block' if start == 0 else '':<12}{'  '.join(by_block[start : start + 5])}"
        )
    for program, answer in _items(part, "programs"):
        lines.append(f"{program:<12} {'loads it' if answer['loads'] else answer.get('why', 'no')}")
    return lines


def _differences(whole: dict[str, Any]) -> list[str]:
    """Say how many parameters have whole differences, how large they are, and which."""
    if not whole.get("num"):
        return []
    zero = f", {whole['num_zero']} of them zero" if whole.get("num_zero") else ""
    names = [f"{name} ({count})" for name, count in _items(whole, "names")]
    return [
        f"{'differences':<12}{whole['num']} whole{zero}, norm {_figure(whole.get('norm'))}",
        *(f"{'':<12}{', '.join(names[start : start + 4])}" for start in range(0, len(names), 4)),
    ]


def _pairs(shown: list[tuple[str, Any]]) -> list[str]:
    return [f"{name:<12}{value}" for name, value in shown if value not in (None, "")]


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
