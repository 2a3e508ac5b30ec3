"""`menma push`: upload what a run has written to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import output
from app.cli.options import Json, RunsDir, command_app
from trainer.contract.errors import UserError

app = command_app()
RUNS = Path("runs")


@app.command()
def push(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|FILE", help="A run, or a .safetensors file of it."),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/REPO", help="Made if it does not exist.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see a repository that is made.")
    ] = False,
    runs_dir: RunsDir = RUNS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded, and do nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload outputs, and a page about them where the repository has none.

    The token comes from `hf auth login` or HF_TOKEN; Menma neither sees nor stores it.
    """
    from app.domain.hub_upload import model_card, upload

    files = _files(what, runs_dir)
    card = model_card(files, repo)
    if dry_run:
        for file in files:
            output.data(f"{file} -> {repo}/{file.name}")
        output.say(card)
        return
    address = upload(files, card, repo, private=not public)
    if as_json:
        output.json_data({"url": address, "files": [file.name for file in files]})
    else:
        output.data(address)


def _files(what: str, runs_dir: Path) -> list[Path]:
    path = Path(what)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        return [path]
    from app.cli.commands.runs import find_run
    from app.cli.watching import output_files

    run = find_run(what, runs_dir)
    files = [Path(file) for file in output_files(run)]
    if not files:
        raise UserError(
            f"{run.root.name} has written no output yet", hint=f"looked in {run.output}"
        )
    return files
