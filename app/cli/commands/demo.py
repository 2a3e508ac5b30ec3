"""`menma demo`: the whole way on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import jobs, output
from app.cli.options import command_app

app = command_app()


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder for everything the demo makes.")
    ] = Path("demo"),
) -> None:
    """Show the whole way on a tiny model.

    Makes clips, caches, trains, samples and merges; needs no GPU and no download. A terminal with
    colours shows frames from before and after the training.
    """
    for path in jobs.run_or_leave("demo", {"directory": str(directory)}).paths[-1:]:
        output.data(path)
