"""Presets: partial configs with a head that says what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from trainer.contract.config import TrainingSection
from trainer.contract.config_io import find_preset, place_problems, problems_of, read_toml
from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.options import Options
from trainer.contract.preset_folders import PRESETS_DIR, presets_dirs

Goal = Literal["general", "character", "style", "motion", "full"]
CARD_SIZES_GB = (10, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Sizes that are printed on boxes of GPUs."""


class PresetData(Options):
    """The data that a preset's steps are reckoned for."""

    num_items: int = Field(ge=1)
    """Clips or images."""
    views: int = Field(ge=1)
    """How often each is trained on."""


class PresetHead(Options):
    """`[preset]`: what a preset is for; only the title is needed."""

    title: str
    """A line."""
    description: str = ""
    """For whom it is, and why its values are what they are."""
    variant: str = ""
    """Model variant."""
    goal: Goal | None = None
    """What is learned; `full` trains a whole model."""
    card_gb: int | None = Field(None, ge=1)
    """Size of the GPU that it is made for, as it stands on the box."""
    num_gpus: int = Field(1, ge=1)
    """How many of these."""
    ram_gb: int | None = Field(None, ge=1)
    """RAM of a machine in which it runs, by the estimate."""
    peak_vram_gib: float | None = Field(None, gt=0)
    """Estimated peak of a GPU over caching, training and sampling, with `source`'s clip size."""
    data: PresetData | None = None
    """What `training.max_steps` is for."""
    source: dict[str, Any] = Field(default_factory=dict)
    """Keys of `[[dataset.sources]]` that `menma new` writes."""
    files: dict[str, str] = Field(default_factory=dict)
    """Usual names of the weight files, by key of `[model]`, which `menma new` writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One preset file."""

    name: str
    path: Path
    head: PresetHead
    values: dict[str, Any] = field(default_factory=dict)
    """What the preset sets, without its head."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with the file; nothing of a file that cannot be read is known but its name."""

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return self.head.title

    @property
    def description(self) -> str:
        """For whom it is, and why its values are what they are."""
        return self.head.description

    @property
    def variant(self) -> str:
        """Model variant; "" where it says none."""
        return self.head.variant or str(dict(self.values.get("model", {})).get("variant", ""))

    @property
    def peak_vram_gib(self) -> float | None:
        """Estimated peak of a GPU."""
        return self.head.peak_vram_gib

    @property
    def files(self) -> dict[str, str]:
        """Usual names of the weight files, by key of `[model]`."""
        return self.head.files

    @property
    def source(self) -> dict[str, Any]:
        """Keys of `[[dataset.sources]]` that `menma new` writes."""
        return self.head.source

    @property
    def medium(self) -> str:
        """`images`, `clips`, or "" where the preset does not say."""
        if any(key.startswith("image_") for key in self.source):
            return "images"
        return "clips" if self.source else ""

    @property
    def max_steps(self) -> int:
        """Weight updates of a run that sets nothing else."""
        default = TrainingSection.model_fields["max_steps"].default
        return int(self.values.get("training", {}).get("max_steps", default))

    @property
    def is_shipped(self) -> bool:
        """Whether it comes with Menma."""
        return self.path.parent == PRESETS_DIR

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        head = self.head.model_dump(mode="json")
        return {
            "name": self.name,
            **head,
            "variant": self.variant,
            "medium": self.medium or None,
            "path": str(self.path),
            "shipped": self.is_shipped,
            "values": self.values,
            "problems": [
                {"message": p.message, "key": p.key, "file": str(p.file or self.path),
                 "line": p.line, "hint": p.hint}
                for p in self.problems
            ],
        }  # fmt: skip


def read_preset(name: str) -> Preset:
    """Return a preset, given by name or by path. Its values are not judged.

    Raises:
        ConfigError: there is none of that name, it is no TOML, or its head is missing or wrong.
    """
    path = find_preset(name)
    content, places = read_toml(path)
    raw = content.pop("preset", None)
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} is not a preset: it has no [preset] head",
            hint="a preset begins with [preset], title, description, variant",
        )
    try:
        head = PresetHead.model_validate(raw)
    except ValidationError as error:
        found = problems_of(error, PresetHead, prefix="preset")
        raise ConfigError(problems=place_problems(found, places)) from error
    unknown = [key for key in head.source if key not in SourceOptions.model_fields]
    if unknown:
        found = [Problem("unknown key of a source", f"preset.source.{key}") for key in unknown]
        raise ConfigError(problems=place_problems(found, places))
    return Preset(name=path.stem, path=path, head=head, values=content)


def usable_preset(name: str) -> Preset:
    """Return a preset whose values are right, given by name or by path.

    Raises:
        ConfigError: as `read_preset`, or values are unknown or wrong, with file and line.
    """
    from app.domain.config_view import complete_values

    preset = read_preset(name)
    if not preset.is_shipped:  # those are right, tests see to that
        complete_values(str(preset.path))
    return preset


def all_presets() -> list[Preset]:
    """Return all presets by name; a user's one hides a shipped one of the same name.

    Files that are wrong are among them, with their `problems`.
    """
    names = {path.stem for folder in presets_dirs() for path in folder.glob("*.toml")}
    return [_judged(name) for name in sorted(names)]


def card_memory_gib(card_gb: int) -> float | None:
    """Return what a GPU of that size on its box has at least, as its driver reports it.

    The least of the known GPUs of the size counts: ECC or the driver keep up to a twelfth. None:
    no known GPU has this size.
    """
    from trainer.contract.memory_model.gpus import GPUS  # brings the whole estimate with it

    sizes = [
        gpu.memory_gib
        for gpu in GPUS.values()
        if min(size for size in CARD_SIZES_GB if size >= gpu.memory_gib) == card_gb
    ]
    return min(sizes, default=None)


def _judged(name: str) -> Preset:
    """Return a preset with what is wrong with it."""
    path = find_preset(name)
    preset = Preset(name=name, path=path, head=PresetHead(title=""))
    try:
        preset = read_preset(name)
        return usable_preset(name)
    except ConfigError as error:
        return replace(preset, problems=error.problems)


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
