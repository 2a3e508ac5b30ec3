"""Presets: partial configs with a head that says what they are for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.config_io import PRESETS_DIR, find_preset, presets_dirs
from trainer.contract.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One preset file."""

    name: str
    path: Path
    title: str
    description: str
    variant: str
    peak_vram_gib: float | None
    """Estimated peak of caching and training with the variant's own clip size."""
    files: dict[str, str]
    """Usual names of the weight files, by key of `[model]`."""
    values: dict[str, Any]
    """What the preset sets, without its head."""

    @property
    def is_shipped(self) -> bool:
        """Whether it comes with Menma."""
        return self.path.parent == PRESETS_DIR

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "variant": self.variant,
            "peak_vram_gib": self.peak_vram_gib,
            "path": str(self.path),
            "shipped": self.is_shipped,
            "files": self.files,
            "values": self.values,
        }


def read_preset(name: str) -> Preset:
    """Return a preset, given by name or by path.

    Raises:
        ConfigError: there is none of that name, or its head is missing.
    """
    path = find_preset(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read preset {path}: {error}") from error
    head = content.pop("preset", None)
    if not isinstance(head, dict) or not isinstance(head.get("title"), str):
        raise ConfigError(
            f"{path} is not a preset: it has no [preset] head",
            hint="a preset begins with [preset], title, description, variant",
        )
    return Preset(
        name=path.stem,
        path=path,
        title=head["title"],
        description=str(head.get("description", "")),
        variant=str(head.get("variant", "")),
        peak_vram_gib=_positive(path, head.get("peak_vram_gib")),
        files={str(key): str(value) for key, value in dict(head.get("files", {})).items()},
        values=content,
    )


def _positive(path: Path, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise ConfigError(f"{path}: peak_vram_gib is a positive number of GiB, not {value!r}")


def all_presets() -> list[Preset]:
    """Return all presets by name; a user's one hides a shipped one of the same name."""
    names = {path.stem for folder in presets_dirs() for path in folder.glob("*.toml")}
    return [read_preset(name) for name in sorted(names)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `section.key` -> value; lists of tables get an index."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, name)
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for index, part in enumerate(value):
                flat |= flatten(part, f"{name}[{index}]")
        else:
            flat[name] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return `section.key` -> (old, new) where two configs differ; None where one has no value."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key) != after.get(key)
    }
