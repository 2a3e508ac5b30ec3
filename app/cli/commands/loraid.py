"""`menma loraid`: cut a network into slots for LoRAs that shall not overwrite each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from app.cli import completion, output
from app.cli.options import Json, Overrides, command_app
from trainer.contract.errors import UserError
from trainer.contract.registry import nearest

if TYPE_CHECKING:
    from trainer.contract.loraid_plan import Plan
    from trainer.contract.variants import TransformerConfig

app = command_app(help="Slots for LoRAs that shall not overwrite each other.")


@app.callback()
def group() -> None:
    """Slots for LoRAs that shall not overwrite each other (docs/loraid.md)."""


@app.command()
def plan(  # noqa: PLR0913, PLR0917  (Typer makes one option of each argument)
    config: Annotated[
        Path | None,
        typer.Argument(help="Config whose model is cut; its [adapter.loraid] gives defaults."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", "-n", min=1, help="How many slots.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            help="Model, e.g. wan2.1-t2v-14b, without a config.",
            autocompletion=completion.variants,
        ),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Blocks of a model of unknown sizes.")
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            help="pair (default), block, module or linear.",
            autocompletion=completion.granularities,
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="contiguous (default) or spread.",
            autocompletion=completion.allocations,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Rank of a slot's LoRA; left out: a useful one."),
    ] = None,
    full_rank: Annotated[
        int | None,
        typer.Option("--full-rank", min=1, help="Rank of the whole LoRA to compare with (32)."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what each of N slots owns, how large its LoRA is, and which rank makes it useful.

    Loads no weights.

    Example: menma loraid plan --variant wan2.1-t2v-14b --slots 20 --allocation spread
    """
    given = {"slots": slots, "granularity": granularity, "allocation": allocation, "rank": rank}
    chosen = {key: value for key, value in given.items() if value is not None}
    for key, kind in (("granularity", "Granularity"), ("allocation", "Allocation")):
        if key in chosen:
            _check_word(key, str(chosen[key]), kind)
    if sum(one is not None for one in (config, variant, blocks)) != 1:
        raise UserError(
            "name the model once: a config, --variant or --blocks",
            hint="menma loraid plan --help shows an example",
        )
    if overrides and config is None:
        raise UserError("--set changes values of a config, and none is given")
    shape: TransformerConfig | None = None
    if config is not None:
        shape, below = _of_config(config, overrides or [])
        chosen = below | chosen
    elif variant is not None:
        from trainer.contract.variants import get_variant

        shape = get_variant(variant).transformer
    if "slots" not in chosen:
        raise UserError("--slots is missing", hint="e.g. --slots 20")
    _show(_plan(shape, blocks, chosen, full_rank), as_json=as_json)


def _of_config(path: Path, overrides: list[str]) -> tuple[TransformerConfig, dict[str, Any]]:
    """Return the sizes of a config's model, and what it says of slots and rank."""
    from trainer.contract.config_io import load_config
    from trainer.contract.loraid_rules import loraid_options
    from trainer.contract.memory_model.workload import shape_of, variant_of

    config = load_config(path, overrides)
    told: dict[str, Any] = {}
    if (options := loraid_options(config)) is not None:
        told = options.model_dump(exclude={"slot"})
        if isinstance(rank := config.adapter.options("kind").get("rank"), int):
            told["rank"] = rank
    return shape_of(config, variant_of(config)), told


def _plan(
    shape: TransformerConfig | None, blocks: int | None, chosen: dict[str, Any], full: int | None
) -> Plan:
    from trainer.contract.loraid import Partition
    from trainer.contract.loraid_plan import FULL_RANK, plan_slots

    rank = chosen.pop("rank", None)
    partition = Partition(
        num_blocks=shape.num_layers if shape is not None else blocks or 0,
        image=shape is not None and shape.image_dim is not None,
        **chosen,
    )
    return plan_slots(partition, shape, rank=rank, full_rank=full or FULL_RANK)


def _check_word(key: str, word: str, kind: str) -> None:
    from trainer.contract import loraid

    words = get_args(getattr(loraid, kind))
    if word not in words:
        raise UserError(f"--{key}: there is no {word!r}", hint=nearest(word, words))


def _show(plan: Plan, *, as_json: bool) -> None:
    from trainer.contract.loraid_plan import rows_in_words

    if as_json:
        output.json_data(plan.to_json())
        return
    headers = ("SLOT", "LAYERS", "PARAMETERS", "WHERE")
    output.data(output.table(headers, rows_in_words(plan), right="SLOT LAYERS PARAMETERS"))
    for note in plan.notes():
        output.say(note)
