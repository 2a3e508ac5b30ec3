"""The options of a config as one list: value, default, what is allowed, help.

Made from the declarations that check a config; the options of plug-ins are those of the ones that
the config chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from app.domain.config_document import ConfigDocument
from app.domain.presets import all_presets, flatten, read_preset
from app.domain.toml_edits import check_value
from app.domain.toml_text import toml_value
from trainer.contract.catalog import PLUGIN_KINDS, SCHEDULES, SOLVERS
from trainer.contract.config import Prompt, RunConfig, TechniqueSection
from trainer.contract.dataset_config import GeneralOptions, SourceOptions
from trainer.contract.errors import ConfigError, UserError
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.options import Options
from trainer.contract.options_page import value_words
from trainer.contract.plugin_options import plugin_schemas
from trainer.contract.registry import nearest
from trainer.contract.sample_formats import SAMPLE_FORMATS
from trainer.contract.variants import VARIANTS

BASIC = frozenset(
    """
    name preset
    model.variant model.transformer model.transformer_high_noise model.expert model.vae
    model.text_encoder model.image_encoder
    dataset.file dataset.general.resolution dataset.general.batch_size
    dataset.sources.video_directory dataset.sources.image_directory dataset.sources.resolution
    dataset.sources.target_frames dataset.sources.num_repeats dataset.sources.batch_size
    adapter.kind adapter.rank adapter.alpha
    objective.timestep_sampler objective.flow_shift
    optimizer.kind optimizer.learning_rate
    lr_schedule.kind lr_schedule.warmup_steps
    training.max_steps training.gradient_accumulation_steps training.seed
    memory.weight_format memory.blocks_to_swap memory.gradient_checkpointing
    distributed.num_processes
    checkpoint.every_steps
    sampling.every_steps sampling.prompts.prompt
    validation.every_steps validation.split
    output.every_steps techniques.name
    """.split()  # noqa: SIM905  (quoted one by one they are hard to read)
)
"""What most configs set, without the places in arrays; the rest are the advanced options."""
_TABLES: dict[str, type[Options]] = {
    "dataset.sources": SourceOptions,
    "validation.sources": SourceOptions,
    "sampling.prompts": Prompt,
    "sampling.loras": SampleLoRA,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One line of the list."""

    key: str
    help: str
    allowed: str
    """Type and range in words."""
    choices: tuple[str, ...] = ()
    default: Any = None
    """What holds where the file sets nothing: the preset's value, or the declared default."""
    from_preset: bool = False
    raw: str | None = None
    """The value as the file writes it; None: it does not."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the value."""

    @property
    def is_basic(self) -> bool:
        """Whether it is of the basic tier; what the file sets is shown there, too."""
        return "".join(part.partition("[")[0] for part in _parts(self.key)) in BASIC

    @property
    def default_words(self) -> str:
        """The default as TOML; empty: there is none."""
        return "" if self.default is None else toml_value(self.default)

    @property
    def value_words(self) -> str:
        """What holds now, as TOML."""
        return self.default_words if self.raw is None else " ".join(self.raw.split())

    @property
    def is_changed(self) -> bool:
        """Whether the file sets it."""
        return self.raw is not None

    def to_raw(self, words: str) -> str:
        """Return what somebody typed as a TOML value; quotes around text may be left out.

        Raises:
            UserError: it is not what the option takes.
        """
        words = words.strip()
        if not words:
            raise UserError("nothing is given", hint="x on the list resets an option")
        takes = _types(self.spec)
        try:
            check_value(words)
        except UserError:
            if "string" not in takes or words[0] in "\"'[{":
                raise
            words = toml_value(words)
        else:
            if takes == {"string"} and words[0] not in "\"'":
                words = toml_value(words)
        if self.choices and takes <= {"string", "boolean"}:
            said = words.strip("\"'")
            if said not in self.choices:
                raise UserError(
                    f"one of {', '.join(self.choices)}", hint=nearest(said, self.choices)
                )
        return words

    def matches(self, words: str) -> bool:
        """Tell whether all words are somewhere in its key, value or help."""
        text = f"{self.key} {self.value_words} {self.help}".lower()
        return all(word in text for word in words.lower().split())


def options_of(document: ConfigDocument) -> list[Option]:
    """Return all options of a config, in the order of the options page."""
    return list(_List(document).options())


class _List:
    """Makes the list for one state of the text."""

    def __init__(self, document: ConfigDocument) -> None:
        self.document = document
        preset = document.value("preset")
        self.preset = _preset_values(preset) if isinstance(preset, str) else {}
        self.lengths = document.lengths()

    def options(self) -> Iterator[Option]:
        for key, info in RunConfig.model_fields.items():
            section = info.annotation
            if isinstance(section, type) and issubclass(section, Options):
                yield from self._section(key, section)
            elif key != "techniques":
                yield self._option(key, _properties(RunConfig)[key], _names(key))
        for number in range(self.lengths.get("techniques", 0)):
            yield from self._section(f"techniques[{number}]", TechniqueSection)

    def _section(self, path: str, section: type[Options]) -> Iterator[Option]:
        slots: dict[str, str] = getattr(section, "slots", {})
        for key, spec in _properties(section).items():
            name = f"{path}.{key}"
            if name in _TABLES:
                for number in range(self.lengths.get(name, 0)):
                    yield from self._section(f"{name}[{number}]", _TABLES[name])
            elif name == "dataset.general":
                yield from self._section(name, GeneralOptions)
            else:
                choices = PLUGIN_KINDS[slots[key]].names if key in slots else _names(name)
                yield self._option(name, spec, choices)
        for slot, kind in slots.items():
            default = _properties(section)[slot].get("default")
            chosen = self._now(f"{path}.{slot}", default)
            properties = plugin_schemas()[kind].get(str(chosen), {}).get("properties", {})
            for key, spec in properties.items():
                yield self._option(f"{path}.{key}", spec, ())

    def _now(self, key: str, default: Any) -> Any:
        value = self.document.value(key)
        return self.preset.get(key, default) if value is None else value

    def _default(self, key: str, declared: Any) -> Any:
        """Return what holds without the file's own value; `general` stands below each source."""
        if key.startswith(("dataset.sources[", "validation.sources[")):
            declared = self._now(f"dataset.general.{key.rpartition('.')[2]}", declared)
        return self.preset.get(key, declared)

    def _option(self, key: str, spec: Mapping[str, Any], choices: tuple[str, ...]) -> Option:
        return Option(
            key=key,
            help=" ".join(str(spec.get("description", "")).split()),
            allowed=value_words(spec).replace("`", ""),
            choices=choices or _choices(spec),
            default=self._default(key, spec.get("default")),
            from_preset=key in self.preset,
            raw=self.document.raw(key),
            spec=spec,
        )


def _preset_values(name: str) -> dict[str, Any]:
    try:
        return flatten(read_preset(name).values)
    except ConfigError:  # the problems of the config say so
        return {}


@cache
def _properties(section: type[Options]) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = section.model_json_schema()["properties"]
    return properties


def _names(key: str) -> tuple[str, ...]:
    """Return names that are not in the schema because registries have them."""
    name = key.rpartition(".")[2]
    if name == "solver":
        return tuple(SOLVERS.names)
    if key == "sampling.format":
        return SAMPLE_FORMATS.names
    if name == "schedule" and ".loras[" not in key:  # there it is a list of points
        return tuple(SCHEDULES.names)
    if key == "model.variant":
        return ("auto", *VARIANTS)
    if key == "preset":
        return tuple(preset.name for preset in all_presets())
    return ()


def _choices(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values that an option can have, where they can be counted."""
    if "enum" in spec:
        return tuple(map(str, spec["enum"]))
    if "const" in spec:
        return (str(spec["const"]),)
    if spec.get("type") == "boolean":
        return ("true", "false")
    return tuple(choice for part in spec.get("anyOf", ()) for choice in _choices(part))


def _types(spec: Mapping[str, Any]) -> set[str]:
    if "anyOf" in spec:
        return {name for part in spec["anyOf"] for name in _types(part)} - {"null"}
    return {str(spec.get("type", "string" if "enum" in spec or "const" in spec else "any"))}


def _parts(key: str) -> Iterator[str]:
    for place, part in enumerate(key.split(".")):
        yield f".{part}" if place else part
