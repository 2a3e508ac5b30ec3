"""A resolved config with the place each value came from."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.domain.presets import flatten
from app.domain.toml_text import toml_value
from trainer.contract.config_io import (
    LoadedConfig,
    find_preset,
    load_config_with_sources,
    read_toml,
)

COMMENT_COLUMN = 44


def resolved(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the config as plain values, without keys that have none."""
    content: dict[str, Any] = loaded.config.model_dump(mode="json", exclude_none=True)
    return content


def complete_values(name: str | None) -> dict[str, Any]:
    """Return what a preset or a config file gives, all defaults filled in; None: defaults alone.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    if name is not None and _is_config(name):
        return resolved(load_config_with_sources(name))
    line = "" if name is None else f"preset = {toml_value(str(find_preset(name).absolute()))}\n"
    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        config = Path(folder) / "config.toml"
        config.write_text(line, encoding="utf-8")
        values = resolved(load_config_with_sources(config, environ={}))
    values.pop("preset", None)
    return values


def compared_values(name: str, other: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of two presets or configs that can be compared, the old ones first.

    Between a preset and a config these are what a preset can hold.

    Args:
        name: preset, or config file.
        other: as `name`; None: `name` is compared with the defaults.

    Raises:
        ConfigError: one of them cannot be read, or is wrong.
    """
    if other is None:
        return complete_values(None), complete_values(name)
    if _is_config(name) == _is_config(other):
        return complete_values(name), complete_values(other)
    both = [_kept(values) for values in (complete_values(name), complete_values(other))]
    return both[0], both[1]


def _is_config(name: str) -> bool:
    return name.endswith(".toml") and not is_preset_file(Path(name))


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a preset can hold."""
    from app.domain.user_presets import is_personal

    return {key: value for key, value in flatten(values).items() if not is_personal(key)}


def is_preset_file(path: Path) -> bool:
    """Tell whether a TOML file has the head of a preset."""
    return isinstance(read_toml(path)[0].get("preset"), dict)


def origins(loaded: LoadedConfig) -> dict[str, str]:
    """Return `section.key` -> where its value came from, `default` for the rest."""
    return {key: _origin(key, loaded) for key in flatten(resolved(loaded))}


def render(loaded: LoadedConfig) -> str:
    """Return the config as TOML, each line with its origin as a comment."""
    return "\n".join(_lines(resolved(loaded), "", "", loaded)).strip("\n")


def _lines(
    values: Mapping[str, Any], header: str, path: str, loaded: LoadedConfig
) -> Iterator[str]:
    tables = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) or _is_table_list(value):
            tables[key] = value
            continue
        text = f"{key} = {toml_value(value)}"
        yield f"{text:<{COMMENT_COLUMN}}  # {_origin(name, loaded)}"
    for key, value in tables.items():
        inner = f"{header}.{key}" if header else key
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            if value:
                yield f"\n[{inner}]"
                yield from _lines(value, inner, name, loaded)
            continue
        for index, part in enumerate(value):
            yield f"\n[[{inner}]]"
            yield from _lines(part, inner, f"{name}[{index}]", loaded)


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _origin(key: str, loaded: LoadedConfig) -> str:
    while key:
        if key in loaded.sources:
            return str(loaded.sources[key])
        # A value inside an inline table or list has the place of the whole.
        key, inner = re.subn(r"\[\d+\](\.[^.\[]+)?$", "", key)
        if not inner:
            return "default"
    return "default"
