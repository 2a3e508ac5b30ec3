"""What choosing a preset makes of a config: its text, what changes, whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain.cards import Card
from app.domain.config_check import Checked, check_text
from app.domain.config_document import ConfigDocument
from app.domain.config_view import resolved
from app.domain.presets import Preset, differences, flatten
from app.domain.toml_text import toml_value
from trainer.contract.config_io import load_config_with_sources
from trainer.contract.errors import ConfigError, UserError

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetChoice:
    """A config that stands on a preset."""

    text: str
    changes: Changes = field(default_factory=dict)
    """`section.key` -> value before and after."""
    kept: Changes = field(default_factory=dict)
    """What the file sets otherwise than the preset, and keeps: -> the file's, the preset's."""
    problem: str = ""
    """Why it cannot be chosen, or compared; empty: it can."""
    checked: Checked = field(default_factory=Checked)


def choose_preset(
    text: str, path: Path, preset: Preset, card: Card | None, *, give_way: bool
) -> PresetChoice:
    """Return a config as it would be with another preset.

    Args:
        text: the config, perhaps with mistakes.
        path: its file.
        preset: without mistakes, of the shipped ones or the user's own.
        card: GPU of the estimate; None: sizes without a verdict.
        give_way: what the file sets otherwise than the preset is taken out of the file, so that
            the preset counts; else the file's values win, as always.
    """
    document = ConfigDocument(text)
    if not document.is_toml:
        return PresetChoice(text=text, problem="the text is not valid TOML: mend it first")
    own = _own(document, preset)
    try:
        document.set("preset", toml_value(preset.name))
        for key, (now, of_preset) in own.items():
            if give_way and now != of_preset:
                document.remove(key)
    except UserError as error:
        return PresetChoice(text=text, problem=error.message)
    after = document.text
    kept = {} if give_way else {k: pair for k, pair in own.items() if pair[0] != pair[1]}
    checked = check_text(after, path, card)
    try:
        changes = differences(_resolved(text, path), _resolved(after, path))
    except (ConfigError, OSError, ValueError):
        why = "the config has problems, so that it cannot be compared"
        return PresetChoice(text=after, kept=kept, problem=why, checked=checked)
    changes.pop("preset", None)
    return PresetChoice(text=after, changes=changes, kept=kept, checked=checked)


def _own(document: ConfigDocument, preset: Preset) -> Changes:
    """Return what the file and the preset both set: key -> the file's value, the preset's."""
    of_preset = flatten(preset.values)
    return {
        key: (document.value(key), value)
        for key, value in of_preset.items()
        if "[" not in key and document.raw(key) is not None
    }


def _resolved(text: str, path: Path) -> dict[str, Any]:
    return resolved(load_config_with_sources(path, text=text))
