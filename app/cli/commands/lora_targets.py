"""`menma lora targets`: what a config would train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import output
from app.cli.options import Config, Json, Overrides

if TYPE_CHECKING:
    from app.domain.targets import TargetList


def targets(
    config: Config,
    modules: Annotated[
        bool, typer.Option("--modules", help="A row for each module instead of each type.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """List what a config would train: modules, ranks, parameters, learning rates.

    From the header of the weights, or from model.variant where there are none yet.
    """
    from app.domain.targets import module_rows, target_list, type_rows
    from trainer.contract.config_io import load_config_with_sources, place_problems
    from trainer.contract.errors import ConfigError

    loaded = load_config_with_sources(config, overrides or ())
    try:
        found = target_list(loaded.config)
    except ConfigError as error:
        problems = place_problems(error.problems, loaded.sources)
        raise ConfigError(problems=problems) from error
    if as_json:
        output.json_data(found.to_json())
        return
    figures = ("RANK", "ALPHA", "LR", "PARAMETERS")
    first = ("MODULE",) if modules else ("TYPE", "BLOCKS", "MODULES")
    rows = module_rows(found) if modules else type_rows(found)
    right = " ".join(("MODULES", *figures))
    output.data(output.table((*first, *figures), rows, right=right))
    for line in _summary(found):
        output.say(line)


def _summary(found: TargetList) -> Iterator[str]:
    what = "parameters of the model itself" if found.kind == "none" else f"{found.kind}"
    yield f"{found.variant}, {what}: {found.total:,} trained in {len(found.modules)} modules."
    if counts := found.by_block.values():
        low, high = min(counts), max(counts)
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        yield f"{len(counts)} blocks with {each} each."
    if found.up_lr_ratio != 1.0:
        yield f"LoRA+: the up factors learn {found.up_lr_ratio:g} times as fast as listed."
    yield (
        f"Optimizer {found.optimizer}: {found.optimizer_bytes / 2**20:,.1f} MiB of state. "
        f"Output: {found.output_parameters:,} numbers."
    )
