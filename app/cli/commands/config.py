"""`menma config`: look at a config."""

from __future__ import annotations

from app.cli import output
from app.cli.options import Config, Json, Overrides, command_app

app = command_app(help="Look at a config.")


@app.callback()
def config() -> None:
    """Look at a config."""


@app.command()
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show every value of a config, and where it came from."""
    from app.domain.config_view import origins, render, resolved
    from trainer.contract.config_io import load_config_with_sources

    loaded = load_config_with_sources(config, overrides or ())
    if as_json:
        output.json_data({"config": resolved(loaded), "sources": origins(loaded)})
    else:
        output.data(render(loaded))
