"""`menma lora resize` and `extract`: LoRAs of another rank, and out of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import completion, jobs
from app.cli.commands.lora_options import (
    Dtype,
    Energy,
    Expert,
    File,
    Force,
    Frobenius,
    Layout,
    Rank,
    Ratio,
    Target,
    show_written,
    written_request,
)
from app.cli.options import Json


def resize(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    file: File,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    ratio: Ratio = None,
    layout: Layout = None,
    dtype: Dtype = None,
    expert: Expert = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Change the rank of a LoRA, by singular values.

    LoHa and LoKr become plain LoRAs. Of several limits the tightest counts.

    Example: menma lora resize big.safetensors --energy 0.98 --rank 32 -o small.safetensors
    """
    request = {
        "input": str(file),
        "expert": expert,
        "rank": rank,
        "energy": energy,
        "frobenius": frobenius,
        "ratio": ratio,
        **written_request(target, layout, dtype, force=force),
    }
    show_written(jobs.run_or_leave("lora_resize", request), as_json=as_json)


def extract(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    base: Annotated[
        Path, typer.Argument(help="Model before: a file or a folder.", show_default=False)
    ],
    tuned: Annotated[
        Path, typer.Argument(help="The same model after training.", show_default=False)
    ],
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    frobenius: Frobenius = None,
    ratio: Ratio = None,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial", help="Leave out what a LoRA cannot hold: norms, biases and others."
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu or cuda: where singular values are computed.",
            autocompletion=completion.devices,
        ),
    ] = "auto",
    layout: Layout = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a LoRA of what two checkpoints differ in.

    Example: menma lora extract wan.safetensors tuned.safetensors --rank 64 -o out.safetensors
    """
    request = {
        "base": str(base),
        "tuned": str(tuned),
        "rank": rank,
        "energy": energy,
        "frobenius": frobenius,
        "ratio": ratio,
        "allow_partial": allow_partial,
        "device": device,
        **written_request(target, layout, dtype, force=force),
    }
    show_written(jobs.run_or_leave("lora_extract", request), as_json=as_json)
