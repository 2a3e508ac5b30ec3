"""`menma import`: configs of other trainers as configs of Menma."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import output
from app.cli.options import Json, command_app
from trainer.contract.errors import UserError
from trainer.contract.files import write_text
from trainer.contract.registry import nearest

if TYPE_CHECKING:
    from app.domain.importing.reading import Tool
    from app.domain.importing.report import Imported

app = command_app()


@app.command(name="import")
def import_(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Configs, dataset files and scripts of one trainer."),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--command", "-c", help="A command line of musubi-tuner, in quotes."),
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TRAINER",
            help="musubi, takenoko, diffusion-pipe or simpletuner; left out: told by the content.",
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, `-` for stdout. Default: "
                     "configs/<name>.toml."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Turn a config of musubi-tuner, Takenoko, diffusion-pipe or SimpleTuner into one of Menma.

    Says of every key what became of it; nothing that is read is run.

    Example: menma import train_wan.sh dataset.toml -o configs/fish.toml
    """
    from app.domain.importing.converting import import_config

    imported = import_config(files or [], command=command, tool=_tool(tool))
    path = target or Path("configs") / f"{imported.name}.toml"
    on_stdout = str(path) == "-"
    if not on_stdout and path.exists() and not force:
        raise UserError(
            f"{path} exists already", hint="choose another file with -o, or add --force"
        )
    if on_stdout:
        if as_json:
            raise UserError("--json and -o - both write to stdout", hint="give a file to -o")
        output.data(imported.text.rstrip("\n"))
    else:
        write_text(path, imported.text)
    if as_json:
        output.json_data(imported.to_json(path))
        return
    _show(imported, words_only=on_stdout)
    if not on_stdout:
        output.say(f"Written: {path}. Next: menma check {path}")


def _tool(name: str | None) -> Tool | None:
    from app.domain.importing.reading import TOOLS

    if name is None:
        return None
    found = next((tool for tool in TOOLS if tool == name.lower()), None)
    if found is None:
        raise UserError(f"--from: there is no {name!r}", hint=nearest(name, TOOLS))
    return found


def _show(imported: Imported, *, words_only: bool) -> None:
    from app.domain.importing.converting import shorten

    if not words_only:
        rows = [
            (
                row.key,
                shorten(row.value, 24),
                row.status,
                shorten(row.target, 40),
                " ".join(part for part in (row.note, row.hint and f"({row.hint})") if part),
            )
            for row in imported.rows
        ]
        output.data(output.table(("KEY", "VALUE", "STATUS", "IN MENMA", "WHY"), rows))
    for default in imported.defaults:
        output.say(f"{default.key} was left out: {default.target} = {default.value!r}, as there")
    for note in imported.notes:
        output.warn(note)
    counts = imported.counts()
    output.say(", ".join(f"{count} {status}" for status, count in counts.items()) + ".")
