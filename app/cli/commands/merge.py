"""`menma merge`: bake LoRAs into a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.options import Loras, Overrides, command_app, lora_use
from trainer.contract.errors import UserError

app = command_app()


@app.command()
def merge(
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
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bf16, fp16 or fp32; left out: the base's own."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    overrides: Overrides = None,
) -> None:
    """Bake LoRAs into a base model and write the result as one file.

    A config that trains both experts of Wan 2.2 gives two files, FILE_high_noise and
    FILE_low_noise.

    Example: menma merge --base wan.safetensors --lora fish.safetensors:0.8 -o wan-fish.safetensors
    """
    uses = [lora_use(text) for text in loras or ()]
    merges = [_Merge(base, uses, target)]
    if config is not None:
        merges = _from_config(config, overrides or [], merges[0])
    elif overrides:
        raise UserError("--set changes values of a config, and none is given")
    for one in merges:
        if one.base is None or not one.loras:
            missing = "--base FILE" if one.base is None else "--lora FILE"
            raise UserError(f"{missing} is missing", hint="menma merge --help shows an example")
        if one.target.exists() and not force:
            raise UserError(
                f"{one.target} exists already", hint="choose another file with -o, or add --force"
            )
    for one in merges:
        request = {
            "base": str(one.base),
            "loras": one.loras,
            "output": str(one.target),
            "dtype": dtype,
            "force": force,
        }
        for path in jobs.run_or_leave("merge", request).paths:
            output.data(path)


@dataclass(frozen=True, slots=True)
class _Merge:
    base: Path | None
    loras: list[dict[str, Any]]
    target: Path


def _from_config(path: Path, overrides: list[str], asked: _Merge) -> list[_Merge]:
    """Take from the config what the command line leaves out; a merge for each expert it trains."""
    from trainer.contract.config_io import load_config
    from trainer.contract.experts import output_names, trained_experts, trains_both
    from trainer.contract.run_dir import RunDir

    config = load_config(path, overrides)
    both = trains_both(config)
    if both and (asked.base is not None or asked.loras):
        raise UserError(
            f"{path} trains both experts: --base and --lora do not say which of them is meant",
            hint="leave them out, or leave the config out and give both",
        )
    names = output_names(config)
    merges = []
    for expert in trained_experts(config) or (None,):
        model, loras, target = config.model, asked.loras, asked.target
        base = model.transformer_high_noise if expert == "high_noise" else model.transformer
        if not loras:
            trained = RunDir(config.run_dir).output / f"{names[expert]}.safetensors"
            if not trained.is_file():
                raise UserError(
                    f"{trained} does not exist yet",
                    hint=f"train it with `menma train {path}`, or name a file with --lora",
                )
            loras = [{"path": str(trained)}]
        if both:
            target = target.with_stem(f"{target.stem}_{expert}")
        merges.append(_Merge(asked.base or base, loras, target))
    return merges
