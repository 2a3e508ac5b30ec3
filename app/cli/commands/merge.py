"""`menma merge`: bake LoRAs into a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.loraid_options import (
    LoraidCommand,
    LoraidFrom,
    Loraids,
    LoraidStrengths,
    loraid_fields,
)
from app.cli.options import Loras, Overrides, command_app, lora_use
from trainer.contract.errors import UserError

app = command_app()


@app.command(cls=LoraidCommand)
def merge(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    target: Annotated[
        Path, typer.Option("--output", "-o", help="File to write.", show_default=False)
    ],
    config: Annotated[
        Path | None,
        typer.Argument(help="Config whose transformer is the base and whose output is the LoRA."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Transformer weights: a file or a folder.")
    ] = None,
    loras: Loras = None,
    loraids: Loraids = None,
    loraid_strengths: LoraidStrengths = None,
    loraid_from: LoraidFrom = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bf16, fp16 or fp32; left out: the base's own."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    overrides: Overrides = None,
) -> None:
    """Bake LoRAs into a base model and write the result as one file.

    Example: menma merge --base wan.safetensors --lora fish.safetensors:0.8 -o wan-fish.safetensors
    """
    uses = [lora_use(text) for text in loras or ()]
    slots = loraid_fields(loraids, loraid_strengths, loraid_from)
    if config is not None:
        base, uses = _from_config(config, overrides or [], base, uses, slots)
    elif overrides:
        raise UserError("--set changes values of a config, and none is given")
    if base is None or not (uses or slots):
        missing = "--base FILE" if base is None else "--lora FILE"
        raise UserError(f"{missing} is missing", hint="menma merge --help shows an example")
    if target.exists() and not force:
        raise UserError(
            f"{target} exists already", hint="choose another file with -o, or add --force"
        )
    result = jobs.run_or_leave(
        "merge",
        {
            "base": str(base),
            "loras": uses,
            **slots,
            "output": str(target),
            "dtype": dtype,
            "force": force,
        },
    )
    for path in result.paths:
        output.data(path)


def _from_config(
    path: Path,
    overrides: list[str],
    base: Path | None,
    uses: list[dict[str, Any]],
    slots: dict[str, Any],
) -> tuple[Path | None, list[dict[str, Any]]]:
    """Take from the config what the command line leaves out."""
    from trainer.contract.config_io import load_config
    from trainer.contract.run_dir import RunDir

    config = load_config(path, overrides)
    high_noise = config.model.expert == "high_noise"
    transformer = config.model.transformer_high_noise if high_noise else config.model.transformer
    for slot in slots.get("loraids", ()):
        if config.model.expert is not None:
            slot.setdefault("expert", config.model.expert)
    if not uses and not slots:
        trained = RunDir(config.run_dir).output / f"{config.name}.safetensors"
        if not trained.is_file():
            raise UserError(
                f"{trained} does not exist yet",
                hint=f"train it with `menma train {path}`, or name a file with --lora",
            )
        uses = [{"path": str(trained)}]
    return base or transformer, uses
