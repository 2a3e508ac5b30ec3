"""`menma config`: look at a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from app.cli import jobs, output
from app.cli.options import Config, Json, Overrides, command_app
from trainer.contract.errors import UserError
from trainer.contract.files import write_text

app = command_app(help="Look at a config.")


@app.callback()
def config() -> None:
    """Look at a config."""


@app.command()
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show every value of a config, and where it came from."""
    from app.domain.config_view import origins, render, resolved
    from trainer.contract.config_io import load_config_with_sources

    loaded = load_config_with_sources(config, overrides or ())
    if as_json:
        output.json_data({"config": resolved(loaded), "sources": origins(loaded)})
    else:
        output.data(render(loaded))


@app.command()
def deepspeed(
    config: Config,
    overrides: Overrides = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default: stdout.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Show the DeepSpeed config (JSON) that training on this machine would use.

    Example: menma config deepspeed my-lora.toml --set distributed.zero_stage=3 -o ds.json
    """
    if target is not None and target.exists() and not force:
        raise UserError(
            f"{target} exists already", hint="choose another file with -o, or add --force"
        )
    request = {"config": str(config), "set": list(overrides or ())}
    result = jobs.run_or_leave("deepspeed", request, quiet=True)
    content = result.end["deepspeed"]
    if target is None:
        output.json_data(content)
    else:
        write_text(target, json.dumps(content, indent=2) + "\n")
        output.data(str(target))
