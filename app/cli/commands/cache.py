"""`menma cache`: encode clips and captions once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    result = jobs.run_or_leave("cache", {"config": str(config), "set": list(overrides or ())})
    _show_counts(result.end)
    output.say(f"Next: menma train {config}")


def _show_counts(end: Mapping[str, Any]) -> None:
    for what, encoded, reused in (
        ("clips", "encoded", "reused"),
        ("captions", "captions_encoded", "captions_reused"),
    ):
        if encoded in end:
            output.say(f"{what}: {end[encoded]} encoded, {end.get(reused, 0)} kept")
    if removed := end.get("removed"):
        output.say(f"{removed} entries that nothing needs any more were removed")
