"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.contract.errors import UserError

Config = Annotated[Path, typer.Argument(help="Config file (TOML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a value of the config, e.g. training.seed=7; wins over the file. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
RunsDir = Annotated[
    Path, typer.Option("--runs-dir", help="Folder of the runs, as in output.runs_dir.")
]
Fps = Annotated[
    float | None,
    typer.Option(
        "--fps",
        min=0.1,
        max=10,
        help="How often a second the app looks for news; 1, and 0.5 over SSH in large windows.",
        show_default=False,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:STRENGTH]",
        help="LoRA and its strength (1 when left out). For one expert of Wan 2.2 add "
        "@high_noise or @low_noise. Repeatable.",
    ),
]


def command_app(**attributes: Any) -> typer.Typer:
    """Return the Typer app of one command; plain help, which starts faster than a drawn one."""
    if "help" in attributes:
        attributes |= {"no_args_is_help": True}
    return typer.Typer(rich_markup_mode=None, add_completion=False, **attributes)


def lora_use(text: str) -> dict[str, Any]:
    """Read `FILE[:STRENGTH][@EXPERT]` into the fields of `contract.jobs.LoRAUse`.

    Raises:
        UserError: the file does not exist.
    """
    from trainer.contract.expert_turns import EXPERTS

    use: dict[str, Any] = {}
    rest = text
    for expert in EXPERTS:
        if rest.endswith(f"@{expert}"):
            rest = rest.removesuffix(f"@{expert}")
            use["expert"] = expert
    file, separator, strength = rest.rpartition(":")
    if separator and not Path(rest).exists():
        try:
            use["strength"] = float(strength)
        except ValueError:
            pass  # a colon of the path itself, as in C:\lora.safetensors
        else:
            rest = file
    if not Path(rest).exists():
        raise UserError(
            f"no such LoRA file: {rest}", hint="write FILE, or FILE:0.8 for its strength"
        )
    return {"path": rest, **use}
