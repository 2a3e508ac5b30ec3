"""`--vary` and `--matrix`: a sheet of samples; `--wildcards` in prompts; `--interactive`."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.contract.errors import UserError
from trainer.contract.files import in_bytes

if TYPE_CHECKING:
    from trainer.contract.vary import Matrix

Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="KEY=VALUES",
        help="Make a sheet of every combination: seed=1..4, guidance=3,5, lora=0,0.5,1 (of all "
        "LoRAs), lora:FILE=0,1, checkpoint=runs/x/output/*.safetensors. Repeatable.",
    ),
]
MatrixFile = Annotated[
    Path | None,
    typer.Option("--matrix", help="A sheet from a TOML file: [vary] with lists of values."),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="KEY",
        help="What differs from left to right on a sheet; else the last.",
    ),
]
UseWildcards = Annotated[
    bool | None,
    typer.Option(
        "--wildcards/--no-wildcards",
        help="Expand {a|b} and __name__ in prompts, chosen by the seed.",
        show_default=False,
    ),
]
WildcardsFolder = Annotated[
    Path | None,
    typer.Option(
        "--wildcards-folder", metavar="DIR", help="Where NAME.txt of __name__ is; wildcards/."
    ),
]
Interactive = Annotated[
    bool,
    typer.Option(
        "--interactive",
        help="Keep the models loaded; each line that is typed or piped in is a prompt, with flags.",
    ),
]


def wildcard_settings(use: bool | None, folder: Path | None) -> dict[str, Any]:
    """Return the keys of `[sampling]` that the options set; a folder switches wildcards on."""
    if use is False and folder is not None:
        raise UserError("--no-wildcards and --wildcards-folder at once", hint="give one of the two")
    return {
        "wildcards": True if folder is not None else use,
        "wildcards_folder": None if folder is None else str(folder),
    }


def sheet_fields(
    request: dict[str, Any], vary: list[str] | None, file: Path | None, columns: str | None
) -> dict[str, Any]:
    """Return what a sheet adds to a request for samples; {} when no sheet is asked for.

    Raises:
        UserError: an axis is wrong, or what it makes is too much.
    """
    from trainer.contract.prompt_keys import key_of
    from trainer.contract.vary import check_axes, parse_vary, read_matrix

    if not vary and file is None:
        if columns is not None:
            raise UserError("--columns needs a sheet", hint="add --vary KEY=VALUES")
        return {}
    matrix: Matrix | None = None if file is None else read_matrix(file)
    given = [parse_vary(text) for text in vary or ()]
    keys = {axis.key for axis in given}
    axes = [axis for axis in (matrix.axes if matrix else ()) if axis.key not in keys] + given
    check_axes(axes)
    if not axes:
        raise UserError(f"{file} varies nothing", hint="add a table [vary]")
    fields: dict[str, Any] = {"axes": [axis.model_dump() for axis in axes]}
    columns = columns or (matrix.columns if matrix else None)
    fields["columns"] = columns and (key_of(columns) or columns)
    if matrix and not request["prompts"] and not request["prompts_file"]:
        if matrix.prompts and matrix.prompts_file:
            raise UserError(f"{file}: prompts and prompts_file at once", hint="leave one out")
        fields["prompts"] = [
            prompt.model_dump(mode="json", exclude_none=True) for prompt in matrix.prompts
        ]
        fields["prompts_file"] = matrix.prompts_file and str(matrix.prompts_file)
    return fields


def varies_prompts(sheet: dict[str, Any]) -> bool:
    """Tell whether the prompts of a sheet are values of one of its axes."""
    return any(axis["key"] == "prompt" for axis in sheet.get("axes", ()))


def sheet_folder(request: dict[str, Any], target: Path | None) -> Path:
    """Return the folder of a sheet: the one that was given, or one named after what it varies.

    Its name ends in a hash of the prompts, so that other prompts do not replace its page.
    """
    if target is not None:
        return target
    names = [axis["key"].partition(":") for axis in request["axes"]]
    words = [key if not file else f"{key}-{Path(file).stem}" for key, _, file in names]
    name = re.sub(r"[^\w.+-]+", "_", "-".join(["sheet", *words]))
    prompts = [request["prompts"], request["prompts_file"], request["config"]]
    prompts += [axis for axis in request["axes"] if axis["key"] == "prompt"]
    digest = hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()
    return Path(request["output"]) / f"{in_bytes(name, 100)}-{digest[:6]}"


def refuse_with_session(request: dict[str, Any], sheet: dict[str, Any]) -> None:
    """Refuse prompts and sheets beside `--interactive`, which reads its prompts from stdin.

    Raises:
        UserError: there are some.
    """
    given = "--vary or --matrix" if sheet else "--prompt" if request["prompts"] else ""
    given = given or ("--prompts-file" if request["prompts_file"] else "")
    if given:
        raise UserError(
            f"--interactive reads its prompts from stdin, without {given}",
            hint="type them, or pipe a file in: menma sample CONFIG --interactive < prompts.txt",
        )
