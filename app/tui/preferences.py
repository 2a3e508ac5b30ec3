"""What the user's file makes of keys and themes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from textual.theme import Theme

from app.domain.app_memory import remembered_theme
from app.domain.app_settings import AppSettings, read_settings
from app.tui.theme import DARK, TERMINAL, THEMES, themes_of

FEW_COLOURS = frozenset({"linux", "screen", "vt100", "ansi", "xterm"})
"""Terminals of 16 colours: the theme of their own colours suits them best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Keys and themes of one start of the app."""

    themes: tuple[Theme, ...] = THEMES
    theme: str = ""
    """The one that the file names; empty: none."""
    remembered: str = ""
    """The one that was chosen by its key the last time."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Action -> keys, where they differ from the default ones."""
    problems: tuple[str, ...] = ()
    """What of the file does not hold."""
    file: Path | None = None
    remembers: bool = False
    """A theme that is chosen by its key is kept for the next time."""


def read_preferences(settings: AppSettings | None = None) -> Preferences:
    """Read the user's file; what is wrong with it is in `problems`."""
    settings = settings or read_settings()
    themes, problems = themes_of(settings)
    keys: Mapping[str, str] = {}
    if settings.keys:
        from app.tui.keymap import all_actions, key_map  # loads all screens

        found = key_map(all_actions(), settings.keys)
        keys = found.changed
        problems += [f"keys: {problem}" for problem in found.problems]
    return Preferences(
        themes=tuple(themes),
        theme=settings.theme,
        remembered=remembered_theme(),
        keys=keys,
        problems=(*settings.problems, *problems),
        file=settings.path,
        remembers=True,
    )


def first_theme(preferences: Preferences) -> str:
    """Return the theme to begin with: the file's, what suits the terminal, the remembered one."""
    names = [TERMINAL, *(theme.name for theme in preferences.themes)]
    if preferences.theme in names:
        return preferences.theme
    if os.environ.get("TERM", "") in FEW_COLOURS:
        return TERMINAL
    return preferences.remembered if preferences.remembered in names else DARK.name
