"""Values as TOML text."""

from __future__ import annotations

import re
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_key(key: str) -> str:
    """Return one key as it stands before `=` in TOML."""
    if _BARE_KEY.fullmatch(key):
        return key
    import tomlkit

    return tomlkit.key(key).as_string()


def toml_value(value: Any) -> str:
    """Return a value as it stands behind `=` in TOML."""
    import tomlkit

    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(part) for part in value) + "]"
    if isinstance(value, dict):
        inside = ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return str(tomlkit.item(value).as_string())
