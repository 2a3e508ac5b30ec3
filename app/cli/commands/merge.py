"""`menma merge`: bake LoRAs into a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs
from app.cli.commands.lora_options import refuse_existing, show_written
from app.cli.options import Json, Loras, Overrides, command_app, lora_use
from trainer.contract.errors import UserError

app = command_app()


@app.command()
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
    base_high_noise: Annotated[
        Path | None,
        typer.Option(
            "--base-high-noise",
            metavar="FILE",
            help="Wan 2.2: the high-noise expert, --base being the low-noise one. Writes "
            "OUT_high_noise and OUT_low_noise.",
        ),
    ] = None,
    loras: Loras = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bf16, fp16 or fp32; left out: the base's own."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Bake LoRAs into a base model, or into both experts of Wan 2.2.

    A base in fp8 stays in fp8 unless --dtype says otherwise; what rounding costs is told.

    Example: menma merge --base wan.safetensors --lora fish.safetensors:0.8 -o wan-fish.safetensors
    """
    uses = [lora_use(text) for text in loras or ()]
    if config is not None:
        base, uses = _from_config(config, overrides or [], base, uses)
    elif overrides:
        raise UserError("--set changes values of a config, and none is given")
    if base is None or not uses:
        missing = "--base FILE" if base is None else "--lora FILE"
        raise UserError(f"{missing} is missing", hint="menma merge --help shows an example")
    if base_high_noise is None:
        refuse_existing(target, force=force)
    result = jobs.run_or_leave(
        "merge",
        {
            "base": str(base),
            "base_high_noise": None if base_high_noise is None else str(base_high_noise),
            "loras": uses,
            "output": str(target),
            "dtype": dtype,
            "force": force,
        },
    )
    show_written(result, as_json=as_json, many=True)


def _from_config(
    path: Path, overrides: list[str], base: Path | None, uses: list[dict[str, Any]]
) -> tuple[Path | None, list[dict[str, Any]]]:
    """Take from the config what the command line leaves out."""
    from trainer.contract.config_io import load_config
    from trainer.contract.run_dir import RunDir

    config = load_config(path, overrides)
    high_noise = config.model.expert == "high_noise"
    transformer = config.model.transformer_high_noise if high_noise else config.model.transformer
    if not uses:
        trained = RunDir(config.run_dir).output / f"{config.name}.safetensors"
        if not trained.is_file():
            raise UserError(
                f"{trained} does not exist yet",
                hint=f"train it with `menma train {path}`, or name a file with --lora",
            )
        uses = [{"path": str(trained)}]
    return base or transformer, uses
