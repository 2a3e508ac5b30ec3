"""`menma new`: write a commented config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from app.cli import completion, output
from app.cli.options import command_app
from trainer.contract.errors import UserError
from trainer.contract.files import write_text

app = command_app()


@app.command()
def new(
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            help="Preset to start from; see `menma presets list`.",
            autocompletion=completion.presets,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, `-` for stdout. Default: configs/<preset>.toml, or "
            "configs/my-lora.toml without a preset.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a config with every option explained.

    Example: menma new --preset wan2.1-t2v-1.3b-lora -o configs/my-lora.toml
    """
    from app.domain.presets import usable_preset
    from app.domain.template import render_config

    chosen = usable_preset(preset) if preset else None
    if target is None:
        target = Path("configs") / f"{chosen.name if chosen else 'my-lora'}.toml"
    text = render_config(_run_name(target), chosen)
    if str(target) == "-":
        output.data(text.rstrip("\n"))
        return
    if target.exists() and not force:
        raise UserError(
            f"{target} exists already", hint="choose another file with -o, or add --force"
        )
    write_text(target, text)
    output.data(str(target))
    output.say("Put in the paths of your model files and clips, then:")
    output.say(f"  menma check {target}")


def _run_name(target: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", target.stem).strip("._-")
    return name[:100] or "my-lora"
