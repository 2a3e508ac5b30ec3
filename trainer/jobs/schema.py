"""Write `schema.json`: every option there is, for those who must not import torch."""

from __future__ import annotations

import json
from typing import Any

from trainer.contract import options_page
from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.files import write_text
from trainer.contract.jobs import SchemaRequest
from trainer.contract.plugin_options import SCHEMA_FILE, plugin_schemas
from trainer.jobs.base import Emit

FORMAT_VERSION = 1


def build_schema() -> dict[str, Any]:
    """Import every plug-in and return the JSON schemas of the config tree and of all options."""
    plugins: dict[str, dict[str, Any]] = {}
    for kind, registry in PLUGIN_KINDS.items():
        plugins[kind] = {}
        for entry in registry:
            implementation: Any = registry.load(entry.name)
            schema = implementation.Config.model_json_schema()
            schema["summary"] = entry.summary
            for fact in ("reference", "maturity"):
                if value := getattr(implementation, fact, None):
                    schema[fact] = str(value)
            if needs := getattr(implementation, "needs", None):
                schema["needs"] = sorted(str(need) for need in needs)
            plugins[kind][entry.name] = schema
    return {
        "version": FORMAT_VERSION,
        "config": RunConfig.model_json_schema(),
        "plugins": plugins,
    }


def schema_text() -> str:
    """Return the content that `schema.json` should have."""
    return json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n"


def is_fresh() -> bool:
    """Return whether `schema.json` says what the code says."""
    return SCHEMA_FILE.is_file() and SCHEMA_FILE.read_text(encoding="utf-8") == schema_text()


def write_schema() -> None:
    """Regenerate `schema.json`."""
    write_text(SCHEMA_FILE, schema_text())


def run(request: SchemaRequest, emit: Emit) -> None:
    """Job `schema`.

    Raises:
        ConfigError: `check` was asked for and the file is stale.
    """
    if not request.check:
        write_schema()
        emit("log", message=f"wrote {SCHEMA_FILE.name}")
        if options_page.PAGE.parent.is_dir():  # a checkout, not an installed package
            plugin_schemas.cache_clear()
            options_page.write_page()
            emit("log", message=f"wrote docs/{options_page.PAGE.name}")
    elif not is_fresh():
        raise ConfigError("schema.json is stale", hint="run: python -m trainer schema")
