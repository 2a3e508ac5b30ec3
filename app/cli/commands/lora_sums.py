"""`menma lora merge`, `subtract`, `blend` and `ema`: LoRAs computed with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import jobs
from app.cli.commands.lora_options import (
    Dtype,
    Energy,
    Expert,
    Force,
    Layout,
    Rank,
    Target,
    Uses,
    refuse_existing,
    show_written,
    written_request,
)
from app.cli.options import Json, lora_use
from trainer.contract.errors import UserError


def merge(
    files: Uses,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    layout: Layout = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add LoRAs to one LoRA, exactly: the ranks add up.

    With --rank or --energy the sum is cut, and the energy that is kept is told.
    `menma merge` bakes LoRAs into a base model.

    Example: menma lora merge fish.safetensors:0.8 style.safetensors -o both.safetensors
    """
    request = {
        "loras": [lora_use(text) for text in files],
        "rank": rank,
        "energy": energy,
        **written_request(target, layout, dtype, force=force),
    }
    show_written(jobs.run_or_leave("lora_merge", request), as_json=as_json)


def subtract(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    minuend: Annotated[
        Path,
        typer.Argument(
            metavar="FROM", help="Base model with LoRAs merged in, or a LoRA.", show_default=False
        ),
    ],
    files: Uses,
    target: Target,
    rank: Rank = None,
    energy: Energy = None,
    layout: Layout = None,
    dtype: Dtype = None,
    expert: Expert = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take LoRAs out of a merged base model, or out of a LoRA.

    What was rounded away in the merge does not come back: where there is the original base,
    keep that instead.
    """
    request = {
        "minuend": str(minuend),
        "expert": expert,
        "loras": [lora_use(text) for text in files],
        "rank": rank,
        "energy": energy,
        **written_request(target, layout, dtype, force=force),
    }
    show_written(jobs.run_or_leave("lora_subtract", request), as_json=as_json)


def blend(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    files: Uses,
    target: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)
    ],
    share: Annotated[
        float,
        typer.Option(
            "--share", help="0 changes nothing, at 1 all become the mean.", show_default=False
        ),
    ],
    votes: Annotated[
        float,
        typer.Option("--votes", help="A LoRA counts in the mean as its norm to this power."),
    ] = 0.0,
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            metavar="GROUP=FACTOR",
            help="Factor in [0, 1] on the share in cross, self, ffn or other. Repeatable.",
        ),
    ] = None,
    rank: Rank = None,
    layout: Layout = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Let LoRAs take over a share of each other's updates.

    Each file is written again, into a folder. --votes 1 is the norm-voted ("democratic") mean,
    in which strong LoRAs count more.

    Example: menma lora blend a.safetensors b.safetensors --share 0.2 -o blended
    """
    request = {
        "files": [lora_use(text) for text in files],
        "output": str(target),
        "share": share,
        "votes": votes,
        "groups": dict(_group(text) for text in groups or ()),
        "rank": rank,
        "layout": layout,
        "dtype": dtype,
        "force": force,
    }
    show_written(jobs.run_or_leave("lora_blend", request), as_json=as_json, many=True)


def ema(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of one LoRA after different steps.", show_default=False),
    ],
    target: Target,
    beta: Annotated[
        float | None,
        typer.Option(
            "--beta", help="Share that the average keeps at each file; 0.95 when left out."
        ),
    ] = None,
    beta2: Annotated[
        float | None, typer.Option("--beta2", help="The share at the last file, reached evenly.")
    ] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option("--sigma-rel", help="Power function of this width instead, up to 0.2887."),
    ] = None,
    sort: Annotated[
        bool, typer.Option("--sort/--no-sort", help="By step, else by name; or as given.")
    ] = True,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Average the updates, cut to the last file's rank by SVD."),
    ] = False,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Average the files that one run saved on its way.

    Example: menma lora ema runs/fish/output/*.safetensors --sigma-rel 0.2 -o fish-ema.safetensors
    """
    refuse_existing(target, force=force)
    request = {
        "files": [str(path) for path in files],
        "beta": beta,
        "beta2": beta2,
        "sigma_rel": sigma_rel,
        "sort": sort,
        "exact": exact,
        "output": str(target),
        "dtype": dtype,
        "force": force,
    }
    show_written(jobs.run_or_leave("lora_ema", request), as_json=as_json)


def _group(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    try:
        return name, float(factor)
    except ValueError:
        raise UserError(
            f"--group {text} is not GROUP=FACTOR", hint="for example --group self=0.5"
        ) from None
