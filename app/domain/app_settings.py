"""The user's file of the app, `app.toml`: keys, theme, own themes.

What is wrong with it is told; it never keeps the app from starting.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain.user_folders import config_folder
from trainer.contract.registry import nearest

SECTIONS = ("theme", "keys", "themes")
COLOURS = (
    "background",
    "surface",
    "panel",
    "foreground",
    "primary",
    "accent",
    "success",
    "warning",
    "error",
    "muted",
)
"""What a theme may set; `muted` is for what is beside the point."""
GROUNDS = ("background", "surface", "panel")
"""Those that words stand on; the others are colours of words."""
BASES = ("dark", "light", "high-contrast")
LEAST_CONTRAST = 4.5
"""Of words to their ground, as WCAG 2.2 (1.4.3) asks for."""
_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_THEME_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class OwnTheme:
    """A theme of the user's."""

    name: str
    base: str
    """Which of ours has the colours that it does not set."""
    colours: dict[str, str]
    """Name -> `#rrggbb`."""


@dataclass(frozen=True, slots=True)
class AppSettings:
    """What the file says."""

    path: Path
    theme: str = ""
    """Empty: it says none."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """The table `[keys]` as it stands there; `tui.keymap` knows which actions there are."""
    themes: tuple[OwnTheme, ...] = ()
    problems: tuple[str, ...] = ()


def settings_file() -> Path:
    """Return where the file is; it need not exist."""
    return config_folder() / "app.toml"


def read_settings(path: Path | None = None) -> AppSettings:
    """Read the file; what cannot be used is left out and told in `problems`.

    Args:
        path: of the file; None: the user's.
    """
    path = path or settings_file()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return AppSettings(path)
    except (OSError, UnicodeDecodeError) as error:
        return AppSettings(path, problems=(f"it cannot be read: {error}",))
    except tomllib.TOMLDecodeError as error:
        return AppSettings(path, problems=(f"it is not valid TOML: {error}",))
    problems = [
        f"there is no {name!r} here: {nearest(name, SECTIONS)}"
        for name in content
        if name not in SECTIONS
    ]
    keys = _table(content, "keys", problems)
    themes = [
        theme
        for name, table in _table(content, "themes", problems).items()
        if (theme := _own_theme(name, table, problems)) is not None
    ]
    name = content.get("theme", "")
    if not isinstance(name, str):
        problems.append("theme: the name of a theme is a text")
        name = ""
    return AppSettings(path, name, keys, tuple(themes), tuple(problems))


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours `#rrggbb`, 1 to 21 (WCAG 2.2, relative luminance)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def pale_words(colours: Mapping[str, str]) -> list[str]:
    """Return which colours of words can hardly be read on which ground, with their contrast."""
    found = []
    for name in COLOURS:
        if name in GROUNDS:
            continue
        for ground in GROUNDS:
            value = contrast(colours[name], colours[ground])
            if value < LEAST_CONTRAST:
                found.append(
                    f"{name} on {ground}: contrast {value:.1f}, {LEAST_CONTRAST} is needed"
                )
    return found


def _table(content: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    table = content.get(name, {})
    if isinstance(table, dict):
        return table
    problems.append(f"{name}: it is a table, written [{name}]")
    return {}


def _own_theme(name: str, table: Any, problems: list[str]) -> OwnTheme | None:
    where = f"themes.{name}"
    if not isinstance(table, dict) or not _THEME_NAME.fullmatch(name):
        problems.append(f"{where}: a theme is a table [themes.NAME]; NAME of a-z, 0-9 and dashes")
        return None
    base = table.get("base", "dark")
    if base not in BASES:
        problems.append(f"{where}.base: there is no {base!r}; one of: {', '.join(BASES)}")
        base = "dark"
    colours = {}
    for key, value in table.items():
        if key == "base":
            continue
        if key not in COLOURS:
            problems.append(f"{where}: there is no colour {key!r}: {nearest(key, COLOURS)}")
        elif not isinstance(value, str) or not _HEX.fullmatch(value):
            problems.append(f"{where}.{key}: {value!r} is no colour; write it as '#5fafd7'")
        else:
            colours[key] = value.lower()
    return OwnTheme(name, base, colours)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
