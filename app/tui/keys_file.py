"""The text of an `app.toml` that says all that can be set, and sets nothing."""

from __future__ import annotations

from collections.abc import Sequence

from app.domain.app_settings import BASES, LEAST_CONTRAST
from app.domain.toml_text import toml_key, toml_value
from app.tui.keyed import shown
from app.tui.keymap import PRESETS, Action
from app.tui.theme import DARK, TERMINAL, THEMES, theme_colours


def default_text(actions: Sequence[Action]) -> str:
    """Return the file, every setting as a comment with its default value."""
    names = ", ".join([*(theme.name for theme in THEMES), TERMINAL])
    lines = [
        "# Menma's app: keys and themes. `menma keys` shows what holds, and what is wrong.",
        "",
        f"# One of: {names}, or of your own below.",
        "# Without it: the one that was chosen by its key the last time.",
        f"# theme = {toml_value(DARK.name)}",
        "",
        "[keys]",
        f"# The keys to start from. One of: {', '.join(PRESETS)}.",
        '# preset = "default"',
        "",
        "# A key is written as x, X, ?, f5, ctrl+x, shift+left, escape, comma;",
        '# several as ["x", "f5"]. Letters do nothing where text is typed.',
    ]
    place = None
    for action in actions:
        if action.place != place:
            place = action.place
            lines += ["", f"# {_HEADS.get(place, place)}"]
        keys = [shown(key) if shown(key) != "," else "comma" for key in action.keys]
        value = toml_value(keys[0] if len(keys) == 1 else keys)
        lines.append(f"# {toml_key(action.id)} = {value}  # {action.help}")
    lines += [
        "",
        f"# A theme of your own; colours that it leaves out are those of `base` ({_or(BASES)}).",
        f"# Words need a contrast of {LEAST_CONTRAST} to background, surface and panel.",
        "# [themes.mine]",
        '# base = "dark"',
    ]
    lines += [f"# {name} = {toml_value(value)}" for name, value in theme_colours(DARK).items()]
    return "\n".join(lines) + "\n"


_HEADS = {"app": "Everywhere", "list": "All lists"}


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
