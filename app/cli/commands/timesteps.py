"""`menma timesteps`: which noise levels a config trains at, and how much they count."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import output
from app.cli.options import Config, Json, Overrides, command_app

app = command_app()


@app.command()
def timesteps(
    config: Config,
    bins: Annotated[
        int,
        typer.Option("--bins", metavar="N", min=1, max=1000, help="Rows, all experts together."),
    ] = 20,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show how timesteps are drawn and weighted.

    From the formulas, over the trained range of each expert: share of the draws and weight of the
    loss. Needs no weights and no GPU.
    """
    from app.domain.timesteps import trained_ranges
    from app.render import timesteps as words
    from trainer.contract.config_io import load_config
    from trainer.contract.experts import trained_experts

    checked = load_config(config, overrides or ())
    parts = max(len(trained_experts(checked)), 1)
    ranges = trained_ranges(checked, max(bins // parts, 1))
    if as_json:
        section = checked.objective
        output.json_data(
            {
                "timestep_sampler": section.timestep_sampler,
                "num_timestep_buckets": section.num_timestep_buckets,
                "weighting": section.weighting,
                "ranges": [one.to_json() for one in ranges],
            }
        )
        return
    right = "SHARE WEIGHT TIMESTEPS"
    output.data(output.table(words.headers(ranges), words.rows(ranges), right=right))
    for line in words.summary(checked, ranges):
        output.say(line)
