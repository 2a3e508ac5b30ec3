"""`menma presets`: what there is to start from."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import output
from app.cli.options import Json, command_app

app = command_app(help="Presets to start from.")


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List the shipped presets and your own (~/.config/menma/presets)."""
    from app.domain.presets import all_presets

    presets = all_presets()
    if as_json:
        output.json_data([preset.to_json() for preset in presets])
        return
    rows = [
        (preset.name, "shipped" if preset.is_shipped else "yours", preset.title)
        for preset in presets
    ]
    output.data(output.table(("NAME", "FROM", "TITLE"), rows))
    output.say("`menma presets show NAME` shows one, `menma new --preset NAME` starts from it.")


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """Show a preset's values and what it is for."""
    from app.domain.presets import flatten, read_preset
    from app.domain.toml_text import toml_value

    preset = read_preset(name)
    if as_json:
        output.json_data(preset.to_json())
        return
    output.say(f"{preset.title} ({preset.path})")
    output.say(preset.description.strip())
    if preset.peak_vram_gib is not None:
        output.say(f"About {preset.peak_vram_gib:g} GiB of GPU memory (estimated).")
    for key, value in flatten(preset.values).items():
        output.data(f"{key} = {toml_value(value)}")


@app.command()
def diff(
    name: str,
    other: Annotated[
        str | None,
        typer.Argument(help="A second preset or a config file; left out: Menma's defaults."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a preset changes against the defaults, or how two presets or configs differ."""
    from app.domain.config_view import complete_values
    from app.domain.presets import differences
    from app.domain.toml_text import toml_value

    old, new = (None, name) if other is None else (name, other)
    changed = differences(complete_values(old), complete_values(new))
    if as_json:
        output.json_data({key: {"old": pair[0], "new": pair[1]} for key, pair in changed.items()})
        return
    for key, (before, after) in changed.items():
        shown = ["(none)" if value is None else toml_value(value) for value in (before, after)]
        output.data(f"{key}: {shown[0]} -> {shown[1]}")
    if not changed:
        output.say("No difference.")
