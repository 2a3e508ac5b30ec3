"""`menma cache`: encode clips and captions once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import jobs, output
from app.cli.options import Config, Overrides, command_app

app = command_app()


@app.command()
def cache(
    config: Config,
    overrides: Overrides = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Also remove from the cache folders what this config does not need; what other "
            "configs cached there, too.",
        ),
    ] = False,
    from_musubi: Annotated[
        bool,
        typer.Option(
            "--from-musubi",
            help="Take what musubi-tuner has cached of these clips where it fits, instead of "
            "encoding it.",
        ),
    ] = False,
    write_musubi: Annotated[
        Path | None,
        typer.Option(
            "--write-musubi",
            metavar="DIR",
            help="Write the caches in musubi-tuner's format, too, with a dataset TOML for it.",
        ),
    ] = None,
) -> None:
    """Encode clips and captions, once.

    What is cached already and has not changed is kept, so it can be interrupted and run again.
    """
    from app.domain.complete import complete_config

    complete_config(config, overrides or (), "cache")
    request: dict[str, Any] = {
        "config": str(config),
        "set": list(overrides or ()),
        "prune": prune,
        "from_musubi": from_musubi,
        "write_musubi": None if write_musubi is None else str(write_musubi),
    }
    result = jobs.run_or_leave("cache", request)
    _show_counts(result.end, config)
    output.say(f"Next: menma train {config}")


def _show_counts(end: Mapping[str, Any], config: Path) -> None:
    for what, encoded, reused, adopted in (
        ("clips", "encoded", "reused", "adopted"),
        ("captions", "captions_encoded", "captions_reused", "captions_adopted"),
    ):
        if encoded in end:
            taken = f", {end[adopted]} taken from musubi-tuner" if end.get(adopted) else ""
            output.say(f"{what}: {end[encoded]} encoded, {end.get(reused, 0)} kept{taken}")
    if exported := end.get("exported"):
        output.say(f"{exported} files written in musubi-tuner's format")
    if removed := end.get("removed"):
        output.say(
            f"{_entries(removed, end['removed_bytes'])} that this config does not need: removed"
        )
    if unneeded := end.get("unneeded"):
        output.say(
            f"{_entries(unneeded, end['unneeded_bytes'])} that this config does not need: kept; "
            "they are of other configs, or of clips and captions that have changed. "
            f"`menma cache {config} --prune` removes them."
        )


def _entries(count: int, num_bytes: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'} ({num_bytes / 2**20:,.1f} MiB)"
