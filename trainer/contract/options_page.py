"""`docs/config.md`: every option there is, from the same declarations that check a config.

`python -m trainer schema` writes it, too; a test fails when it is stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.config import Prompt, RunConfig
from trainer.contract.dataset_config import GeneralOptions, SharedOptions, SourceOptions
from trainer.contract.files import write_text
from trainer.contract.lora_use import SampleLoRA
from trainer.contract.options import Options
from trainer.contract.plugin_options import plugin_schemas

PAGE = Path(__file__).parents[2] / "docs" / "config.md"

_HEAD = """\
# Options

Written by `python -m trainer schema` from the declarations that check a config: do
not edit. A key that is not listed here is an error that names the file, the line and the nearest
key. `--set section.key=value` wins over the file; an environment variable `MENMA__SECTION__KEY`
stands between the two. An empty default means: not set, see the description.
"""
_DATASET = """\
`[dataset]` has `file`, a dataset TOML in musubi-tuner's schema, or the same keys inline:
`[dataset.general]` and one `[[dataset.sources]]` a folder or list (`[[datasets]]` in a dataset
file). A key is looked up in the source, then in `general`.
"""


def options_page() -> str:
    """Return the page."""
    return "\n".join(_page()) + "\n"


def is_fresh() -> bool:
    """Return whether the committed page says what the code says."""
    return PAGE.is_file() and PAGE.read_text(encoding="utf-8") == options_page()


def write_page() -> None:
    """Regenerate the committed page."""
    write_text(PAGE, options_page())


def _page() -> Iterator[str]:
    schema = RunConfig.model_json_schema()
    yield _HEAD
    plain = {
        key: spec
        for key, spec in schema["properties"].items()
        if "$ref" not in spec and key != "techniques"
    }
    yield from _table("Top of the file", "", plain)
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Options)):
            continue
        if name == "dataset":
            yield from _dataset()
            continue
        specs = dict(section.model_json_schema()["properties"])
        yield from _table(f"`[{name}]`", section.__doc__ or "", specs)
        for slot, kind in getattr(section, "slots", {}).items():
            yield from _plugins(slot, kind)
            for key, table in tables_of(kind).items():
                title, words = f"`[{name}.{key}]`", str(table.get("description", ""))
                yield from _table(title, words, table["properties"], level=3)
        if name == "sampling":
            prompt = Prompt.model_json_schema()["properties"]
            yield from _table("`[[sampling.prompts]]`", Prompt.__doc__ or "", prompt, level=3)
            lora = SampleLoRA.model_json_schema()["properties"]
            yield from _table("`[[sampling.loras]]`", SampleLoRA.__doc__ or "", lora, level=3)
    yield "## `[[techniques]]`\n\nOptional behaviour of a training step, in this order.\n"
    yield from _plugins("name", "technique")


def _dataset() -> Iterator[str]:
    yield f"## `[dataset]`\n\n{_DATASET}"
    shared = SharedOptions.model_fields
    general = GeneralOptions.model_json_schema()["properties"]
    source = SourceOptions.model_json_schema()["properties"]
    parts = {
        "In a source or in `general`": {k: v for k, v in source.items() if k in shared},
        "In `general` only": {k: v for k, v in general.items() if k not in shared},
        "In a source only": {k: v for k, v in source.items() if k not in shared},
    }
    for title, specs in parts.items():
        yield from _table(title, "", specs, level=3)


def _plugins(slot: str, kind: str) -> Iterator[str]:
    for entry in PLUGIN_KINDS[kind]:
        schema = plugin_schemas()[kind][entry.name]
        facts = [str(schema[fact]) for fact in ("maturity", "reference") if fact in schema]
        if needs := schema.get("needs"):
            facts.append(f"needs {', '.join(needs)}")
        remark = f" ({'; '.join(facts)})" if facts else ""
        words = f"{entry.summary[0].upper()}{entry.summary[1:]}{remark}."
        title = f'`{slot} = "{entry.name}"`'
        yield from _table(title, words, schema.get("properties", {}), level=3)


def tables_of(kind: str) -> dict[str, Mapping[str, Any]]:
    """Return the options of a kind of plug-in that are tables of their own: name -> schema."""
    found: dict[str, Mapping[str, Any]] = {}
    for schema in plugin_schemas()[kind].values():
        for key, spec in schema.get("properties", {}).items():
            for part in (spec, *spec.get("anyOf", ())):
                if "$ref" in part:
                    found[key] = schema["$defs"][str(part["$ref"]).rpartition("/")[2]]
    return found


def _table(
    title: str, words: str, specs: Mapping[str, Mapping[str, Any]], *, level: int = 2
) -> Iterator[str]:
    yield f"{'#' * level} {title}\n"
    if words:
        yield f"{words.strip()}\n"
    if not specs:
        return
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for key, spec in specs.items():
        default = spec.get("default")
        shown = "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"
        words = str(spec.get("description", "")).replace("\n", " ").replace("|", "\\|")
        yield f"| `{key}` | {value_words(spec)} | {shown} | {words} |"
    yield ""


def value_words(spec: Mapping[str, Any]) -> str:
    """Say in words what an option's JSON schema allows: `whole number ≥ 1`."""
    if "enum" in spec:
        return ", ".join(f"`{value}`" for value in spec["enum"])
    if "anyOf" in spec:
        parts = [value_words(part) for part in spec["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if spec.get("type") == "array":
        items = spec.get("items") or (spec.get("prefixItems") or [{}])[0]
        return f"list of {value_words(items)}"
    if "$ref" in spec:
        return "table"
    if "const" in spec:
        return f"`{spec['const']}`"
    kinds = {"integer": "whole number", "object": "table", "string": "text", "boolean": "bool"}
    name = "path" if spec.get("format") == "path" else str(spec.get("type", "any"))
    return kinds.get(name, name) + _limits(spec)


def _limits(spec: Mapping[str, Any]) -> str:
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
        "multipleOf": "multiple of",
    }
    limits = [f"{sign} {spec[key]:g}" for key, sign in signs.items() if key in spec]
    return f" {', '.join(limits)}" if limits else ""
