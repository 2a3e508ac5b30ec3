"""`menma estimate`: memory, disk and time of a config, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import output
from app.cli.exit_codes import ExitCode
from app.cli.options import Config, Json, Overrides, command_app

if TYPE_CHECKING:
    from trainer.contract.memory_model import Estimate

app = command_app()


@app.command()
def estimate(
    config: Config,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help='For this GPU, e.g. "RTX 4090".')
    ] = None,
    vram: Annotated[
        float | None,
        typer.Option("--vram", metavar="GIB", min=1, help="For a GPU with this much memory."),
    ] = None,
    ram: Annotated[
        float | None,
        typer.Option("--ram", metavar="GIB", min=1, help="For a machine with this much RAM."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Search the settings that fit and are fastest.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, disk and time.

    For the GPU of this machine unless another is named. Needs no GPU, loads no weights.
    """
    from app.domain import cards
    from app.render import estimates
    from trainer.contract import memory_model
    from trainer.contract.config_io import load_config
    from trainer.contract.errors import UserError

    checked = load_config(config, overrides or ())
    card = cards.choose_card(gpu, vram)
    if card is None:
        raise UserError(
            "no GPU was found in this machine",
            hint='name the one to estimate for: --gpu "RTX 4090", or --vram 24',
        )
    known = cards.circumstances(checked, card, ram_gib=ram)
    if not fit:
        result = memory_model.estimate(checked, card.gpu, known)
        if as_json:
            output.json_data(result.to_json())
            return
        _show(result)
        if result.verdict != "fits":  # of the GPU: RAM is not searched for
            output.say("Settings that fit: the same command with --fit")
        return
    found = memory_model.find_fit(checked, card.gpu, known)
    if as_json:
        output.json_data(found.to_json())
    else:
        _show(found.after)
        for line in estimates.fit_lines(found):
            output.say(line, whole=line.startswith("Use:"))
    if not found.found:
        raise typer.Exit(ExitCode.FAILED)


def _show(result: Estimate) -> None:
    from app.render import estimates

    output.data(output.table(("PHASE", "PART", "GIB"), estimates.rows(result), right="GIB"))
    for line in estimates.summary(result):
        output.say(line)
