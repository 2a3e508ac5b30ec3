"""`menma cache`: encode clips and captions once."""

from __future__ import annotations

from app.cli import jobs, output
from app.cli.options import Config, Overrides, command_app

app = command_app()


@app.command()
def cache(config: Config, overrides: Overrides = None) -> None:
    """Encode clips and captions, once.

    What is cached already and has not changed is kept, so it can be interrupted and run again.
    """
    from app.domain.complete import complete_config

    complete_config(config, overrides or (), "cache")
    jobs.run_or_leave("cache", {"config": str(config), "set": list(overrides or ())})
    output.say(f"Next: menma train {config}")
