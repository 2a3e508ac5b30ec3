"""`menma config`: look at a config, change values in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import completion, jobs, output
from app.cli.options import Config, Json, Overrides, command_app
from trainer.contract.errors import UserError
from trainer.contract.files import write_text
from trainer.contract.registry import nearest

if TYPE_CHECKING:
    from app.domain.config_file import ConfigFile

app = command_app(help="Look at a config, change values in it.")


@app.callback()
def config() -> None:
    """Look at a config, change values in it."""


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


@app.command("set")
def set_values(
    config: Config,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Such as training.seed=7.",
            autocompletion=completion.settings,
        ),
    ],
) -> None:
    """Write values into a config file; everything else in it stays as it is, byte for byte.

    Example: menma config set my-lora.toml training.seed=7 model.vae=models/vae.safetensors
    """
    from app.domain.config_file import open_config
    from app.domain.config_options import options_of

    file = open_config(_own(config))
    for text in values:
        key, separator, words = (part.strip() for part in text.partition("="))
        if not separator or not key:
            raise UserError(f"cannot read {text!r}", hint="write section.key=value")
        options = {option.key: option for option in options_of(file.document)}
        if key not in options:
            raise UserError(f"unknown key {key!r}", hint=nearest(key, options))
        try:
            file.document.set(key, options[key].to_raw(words))
        except UserError as error:
            raise UserError(f"{key}: {error.message}", hint=error.hint) from error
    _save(file)


@app.command()
def unset(
    config: Config,
    keys: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY...",
            help="Such as training.seed.",
            autocompletion=completion.option_keys,
        ),
    ],
) -> None:
    """Take values out of a config file, so that the preset's or the default counts again."""
    from app.domain.config_file import open_config

    file = open_config(_own(config))
    for key in keys:
        if file.document.raw(key) is None:
            raise UserError(f"{config} does not set {key!r}")
        file.document.remove(key)
    _save(file)


def _own(config: Path) -> Path:
    """Refuse the config of a run: it says what the run was started with."""
    from app.domain.config_file import is_of_run

    if is_of_run(config):
        raise UserError(
            f"{config} says what a run was started with: it is not changed",
            hint="change your own config and train again, or copy it",
        )
    return config


def _save(file: ConfigFile) -> None:
    """Save the file and say what would have been changed in it; a mistake is told, not refused."""
    from app.domain.config_check import check_text, problem_words

    changed = file.difference()
    if changed:
        file.save()
        output.data(changed.rstrip("\n"))
    for problem in check_text(file.document.text, file.path, None).problems:
        output.warn(problem_words(problem, file.path))
