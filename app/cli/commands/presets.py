"""`menma presets`: what there is to start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import completion, output
from app.cli.options import Config, Json, Overrides, command_app
from trainer.contract.errors import UserError

if TYPE_CHECKING:
    from app.domain.cards import Card
    from app.domain.presets import Preset

app = command_app(help="Presets to start from.")

Name = Annotated[
    str,
    typer.Argument(
        help="Preset: its name, or a file.", show_default=False, autocompletion=completion.presets
    ),
]


@app.command("list")
def list_presets(
    gpu: Annotated[
        int | None,
        typer.Option("--gpu", metavar="GB", min=1, help="Only those for cards of up to this size."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            help="Only those of this model, or of all that begin so.",
            autocompletion=completion.variants,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped presets and your own (~/.config/menma/presets).

    Example: menma presets list --gpu 24 --variant wan2.2
    """
    from app.domain.cards import choose_card
    from app.domain.presets import all_presets

    card = choose_card(None, None)
    everything = all_presets()
    broken = [preset for preset in everything if preset.problems]
    presets = [preset for preset in everything if _is_wanted(preset, gpu, variant)]
    if as_json:
        found = [preset for preset in everything if preset in presets or preset in broken]
        output.json_data([{**one.to_json(), "here": _here(one, card)} for one in found])
        return
    if variant is not None and not presets:
        _require_known(variant)
    if presets:
        output.data(_table(presets, card))
    for preset in broken:
        output.warn(f"preset {preset.name} has mistakes: {preset.path}")
        for problem in preset.problems:
            output.show_problem(problem)
    output.say("`menma presets show NAME` shows one, `menma new --preset NAME` starts from it.")


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show a preset's values and what it is for."""
    from app.domain.cards import choose_card
    from app.domain.preset_offers import offer_of
    from app.domain.presets import flatten, read_preset
    from app.domain.toml_text import toml_value

    preset = read_preset(name)
    card = choose_card(None, None)
    needs = offer_of(preset, card).needs
    if as_json:
        output.json_data({**preset.to_json(), "here": _here(preset, card)})
        return
    output.say(f"{preset.title} ({preset.path})")
    for line in (preset.description.strip(), needs, _verdict(preset, card), _data(preset)):
        if line:
            output.say(line)
    if preset.is_shipped:
        output.say("Starting values from common practice: change them for your data.")
    for key, value in flatten(preset.values).items():
        output.data(f"{key} = {toml_value(value)}")


@app.command()
def diff(
    name: Name,
    other: Annotated[
        str | None,
        typer.Argument(
            help="A second preset or a config file; left out: Menma's defaults.",
            autocompletion=completion.presets_or_configs,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a preset changes against the defaults, or how two presets or configs differ.

    Between a preset and a config only what presets hold is compared: no paths, names or data.
    """
    from app.domain.config_view import compared_values
    from app.domain.presets import differences
    from app.domain.toml_text import toml_value

    changed = differences(*compared_values(name, other))
    if as_json:
        output.json_data({key: {"old": pair[0], "new": pair[1]} for key, pair in changed.items()})
        return
    for key, (before, after) in changed.items():
        shown = ["(none)" if value is None else toml_value(value) for value in (before, after)]
        output.data(f"{key}: {shown[0]} -> {shown[1]}")
    if not changed:
        output.say("No difference.")


@app.command()
def save(
    config: Config,
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the preset.")],
    title: Annotated[str, typer.Option("--title", help="What it is, in a line.")] = "",
    description: Annotated[
        str, typer.Option("--description", help="For whom it is, and why.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite your preset of this name.")
    ] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Save a config's settings as a preset of your own.

    Only what differs from the defaults; paths, names, prompts and your data stay out.

    Example: menma presets save configs/fish.toml --name fish --title "Fish, 24 GB"
    """
    from app.domain.user_presets import save_preset
    from trainer.contract.config_io import load_config

    checked = load_config(config, overrides or ())
    saved = save_preset(checked, name, title=title, description=description, force=force)
    if as_json:
        output.json_data({**saved.preset.to_json(), "left_out": list(saved.left_out)})
        return
    output.data(str(saved.preset.path))
    if saved.left_out:
        output.say(f"Left out: {', '.join(saved.left_out)}")
    if len(checked.dataset.load().sources if saved.preset.source else ()) > 1:
        output.say("Of the dataset only the first source's sizes were kept.")
    output.say(f"Start from it: menma new --preset {name}")


@app.command()
def remove(
    name: Annotated[
        str, typer.Argument(help="Preset of your own.", autocompletion=completion.presets)
    ],
) -> None:
    """Delete a preset of your own."""
    from app.domain.user_presets import remove_preset

    output.say(f"Removed {remove_preset(name)}")


def _is_wanted(preset: Preset, gpu: int | None, variant: str | None) -> bool:
    if not preset.title:
        return False  # unreadable: reported, not listed
    size = preset.head.card_gb or preset.peak_vram_gib
    fits = gpu is None or (size is not None and size <= gpu)
    return fits and (variant is None or preset.variant.startswith(variant))


def _require_known(variant: str) -> None:
    """Raise where no model is called so.

    Raises:
        UserError: with the nearest name.
    """
    from trainer.contract.registry import nearest
    from trainer.contract.variants import VARIANTS

    if not any(name.startswith(variant) for name in VARIANTS):
        raise UserError(f"unknown model variant {variant!r}", hint=nearest(variant, VARIANTS))


def _table(presets: list[Preset], card: Card | None) -> str:
    from app.domain.preset_offers import offer_of

    headers = ["NAME", "GB", "VARIANT", *(["HERE"] if card else []), "FOR"]
    rows = [
        [
            offer.preset.name,
            offer.card_words,
            offer.preset.variant,
            *([offer.verdict_words] if card else []),
            offer.purpose,
        ]
        for offer in (offer_of(preset, card) for preset in presets)
    ]
    return output.table(headers, rows, right="GB")


def _here(preset: Preset, card: Card | None) -> str | None:
    """Return whether this machine's GPUs are enough; None: no GPU, or no estimate."""
    from app.domain.preset_offers import offer_of

    return offer_of(preset, card).verdict


def _verdict(preset: Preset, card: Card | None) -> str:
    found = _here(preset, card)
    if card is None or found is None:
        return ""
    count = f"{card.count} x " if card.count > 1 else ""
    return f"This machine ({count}{card.gpu.name}, {card.gpu.memory_gib:.1f} GiB): {found}."


def _data(preset: Preset) -> str:
    data = preset.head.data
    if data is None:
        return ""
    return (
        f"{preset.max_steps:,} steps show each of {data.num_items:,} {preset.medium or 'items'} "
        f"{data.views} times: with more or fewer, change training.max_steps."
    )
