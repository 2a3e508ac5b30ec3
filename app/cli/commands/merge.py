"""`menma merge`: bake LoRAs into a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import completion, jobs
from app.cli.commands.lora_options import refuse_existing, show_written
from app.cli.loraid_options import (
    LoraidCommand,
    LoraidFrom,
    Loraids,
    LoraidStrengths,
    loraid_fields,
)
from app.cli.options import Json, Loras, Overrides, command_app, lora_use
from trainer.contract.errors import UserError
from trainer.contract.expert_turns import EXPERTS

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
    loraids: Loraids = None,
    loraid_strengths: LoraidStrengths = None,
    loraid_from: LoraidFrom = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="bf16, fp16 or fp32; left out: the base's own.",
            autocompletion=completion.dtypes,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Bake LoRAs into a base model, or into both experts of Wan 2.2.

    A base in fp8 stays in fp8 unless --dtype says otherwise; what rounding costs is told.

    A config that trains both experts of Wan 2.2 gives two files, FILE_high_noise and
    FILE_low_noise.

    Example: menma merge --base wan.safetensors --lora fish.safetensors:0.8 -o wan-fish.safetensors
    """
    slots = loraid_fields(loraids, loraid_strengths, loraid_from)
    asked = _Merge(base, base_high_noise, [lora_use(text) for text in loras or ()], slots)
    if config is not None:
        asked = _from_config(config, overrides or [], asked)
    elif overrides:
        raise UserError("--set changes values of a config, and none is given")
    if asked.base is None or not (asked.loras or asked.slots):
        missing = "--base FILE" if asked.base is None else "--lora FILE"
        raise UserError(f"{missing} is missing", hint="menma merge --help shows an example")
    for path in _outputs(target, both=asked.base_high_noise is not None):
        refuse_existing(path, force=force)
    high_noise = asked.base_high_noise
    request = {
        "base": str(asked.base),
        "base_high_noise": None if high_noise is None else str(high_noise),
        "loras": asked.loras,
        **asked.slots,
        "output": str(target),
        "dtype": dtype,
        "force": force,
    }
    show_written(jobs.run_or_leave("merge", request), as_json=as_json, many=True)


@dataclass(frozen=True, slots=True)
class _Merge:
    """What goes into which model; with two experts `base` is the low-noise one."""

    base: Path | None
    base_high_noise: Path | None
    loras: list[dict[str, Any]]
    slots: dict[str, Any]
    """Slots of LORAID, and where their files are: fields of the job's request."""


def _outputs(target: Path, *, both: bool) -> list[Path]:
    """Return what the job will write."""
    stems = [f"{target.stem}_{expert}" for expert in EXPERTS] if both else [target.stem]
    return [target.with_stem(stem) for stem in stems]


def _from_config(path: Path, overrides: list[str], asked: _Merge) -> _Merge:
    """Take from the config what the command line leaves out."""
    from trainer.contract.config_io import load_config
    from trainer.contract.experts import output_names, trained_experts, trains_both
    from trainer.contract.run_dir import RunDir

    config = load_config(path, overrides)
    both = trains_both(config)
    alone = asked.base is None and asked.base_high_noise is None and not asked.loras
    if both and not alone:
        raise UserError(
            f"{path} trains both experts: --base and --lora do not say which of them is meant",
            hint="leave them out, or leave the config out and give both",
        )
    for slot in asked.slots.get("loraids", ()):
        if config.model.expert is not None and not both:
            slot.setdefault("expert", config.model.expert)
    names, loras = output_names(config), asked.loras
    named = bool(loras or asked.slots)
    for expert in () if named else trained_experts(config) or (None,):
        trained = RunDir(config.run_dir).output / f"{names[expert]}.safetensors"
        if not trained.is_file():
            raise UserError(
                f"{trained} does not exist yet",
                hint=f"train it with `menma train {path}`, or name a file with --lora",
            )
        loras = [*loras, {"path": str(trained), **({"expert": expert} if both else {})}]
    model = config.model
    if both:
        return _Merge(model.transformer, model.transformer_high_noise, loras, asked.slots)
    own = model.transformer_high_noise if model.expert == "high_noise" else model.transformer
    return _Merge(asked.base or own, asked.base_high_noise, loras, asked.slots)
