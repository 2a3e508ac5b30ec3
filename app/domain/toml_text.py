"""Values as TOML text."""

from __future__ import annotations

from typing import Any


def toml_key(key: str) -> str:
    """Return a key as it stands in front of `=` or in the name of a table."""
    import tomlkit

    return str(tomlkit.key(key).as_string())


def toml_value(value: Any) -> str:
    """Return a value as it stands behind `=` in TOML."""
    import tomlkit

    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(part) for part in value) + "]"
    if isinstance(value, dict):
        inside = ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return str(tomlkit.item(value).as_string())
