"""Layers of a config, one over the other: preset < file < environment < `--set`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.config import RunConfig
from trainer.contract.plugin_options import option_names
from trainer.contract.plugin_section import PluginSection


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from."""

    name: str
    file: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass(slots=True)
class Layer:
    """Values that were given in one place, nested as in TOML, and where each of them stands."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any], source: Source) -> None:
        """Put further values of the same place over those that are there."""
        _deep_update(self.values, values)
        self.sources |= dict.fromkeys(_leaves(values), source)


def stacked(layers: Iterable[Layer]) -> Layer:
    """Return what the layers are together; later ones win.

    A layer that chooses another plug-in does not inherit the options of the one that it replaces:
    `--set adapter.kind=none` over a file with a LoRA's rank leaves no rank behind. Options beside
    a kind in one and the same layer are judged like any others.
    """
    whole = Layer()
    for layer in layers:
        for key in _options_left_behind(whole.values, layer.values):
            section, _, option = key.partition(".")
            del whole.values[section][option]
            whole.sources.pop(key, None)
        _deep_update(whole.values, layer.values)
        whole.sources |= layer.sources
    return whole


def plugin_sections() -> Iterator[tuple[str, type[PluginSection]]]:
    """Yield the sections whose further keys are options of plug-ins, by name."""
    for name, info in RunConfig.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, PluginSection):
            yield name, annotation


def _options_left_behind(below: Mapping[str, Any], above: Mapping[str, Any]) -> list[str]:
    """Return keys of `below` that only a plug-in has which `above` replaces by another."""
    found = []
    for name, section in plugin_sections():
        old, new = below.get(name), above.get(name)
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        before, after = (_chosen(section, parts) for parts in ((old,), (new, old)))
        changed = {slot for slot in section.slots if before[slot] != after[slot]}
        if not all(after[slot] in PLUGIN_KINDS[section.slots[slot]] for slot in changed):
            continue  # an unknown name: told later, with nothing lost
        kept = set(section.model_fields).union(
            *(option_names(kind, after[slot]) for slot, kind in section.slots.items())
        )
        lost = {
            option for slot in changed for option in option_names(section.slots[slot], before[slot])
        }
        found += [f"{name}.{option}" for option in old if option in lost - kept]
    return found


def _chosen(section: type[PluginSection], parts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the plug-in of each slot, from the first part that names one, else the default."""
    parts = tuple(parts)
    return {
        slot: next(
            (part[slot] for part in parts if isinstance(part.get(slot), str)),
            section.model_fields[slot].default,
        )
        for slot in section.slots
    }


def _deep_update(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _deep_update(target[key], value)
        elif isinstance(value, Mapping):
            target[key] = {}
            _deep_update(target[key], value)  # a copy all the way down
        else:
            target[key] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name
