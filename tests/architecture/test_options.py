"""Every option is documented, generated files are fresh, shipped files are valid."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from trainer.contract.catalog import PLUGIN_KINDS, SOLVERS
from trainer.contract.config import RunConfig
from trainer.contract.dataset_config import GeneralOptions, SourceOptions
from trainer.contract.jobs import JOBS, REQUESTS
from trainer.jobs.schema import is_fresh

ROOT = Path(__file__).parents[2]
PLUGINS = [(kind, entry) for kind, registry in PLUGIN_KINDS.items() for entry in registry]


def models_within(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield `model` and the models of its fields."""
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from models_within(part)


def undocumented(model: type[BaseModel]) -> list[str]:
    """Return the fields that say nothing about themselves."""
    return [
        f"{part.__name__}.{name}"
        for part in models_within(model)
        for name, field in part.model_fields.items()
        if not field.description
    ]


@pytest.mark.parametrize("model", [RunConfig, GeneralOptions, SourceOptions])
def test_every_option_of_the_config_is_documented(model):
    assert undocumented(model) == []


@pytest.mark.parametrize("name", REQUESTS)
def test_every_option_of_a_job_is_documented(name):
    assert undocumented(REQUESTS[name]) == []


@pytest.mark.parametrize(("kind", "entry"), PLUGINS, ids=lambda part: getattr(part, "name", part))
def test_every_option_of_a_plug_in_is_documented(kind, entry):
    implementation: Any = PLUGIN_KINDS[kind].load(entry.name)
    assert undocumented(implementation.Config) == []
    assert implementation.__doc__


@pytest.mark.parametrize("registry", [JOBS, SOLVERS], ids=lambda registry: registry.kind)
def test_every_registered_name_can_be_imported(registry):
    for entry in registry:
        assert callable(registry.load(entry.name))


def test_every_job_has_its_request():
    assert set(REQUESTS) == set(JOBS.names)


def test_the_schema_is_fresh():
    assert is_fresh(), "run: python -m trainer schema"


@pytest.mark.parametrize("path", sorted((ROOT / "presets").rglob("*.toml")), ids=lambda p: p.stem)
def test_presets_say_what_they_are_for(path):
    head = tomllib.loads(path.read_text(encoding="utf-8"))["preset"]
    assert {"title", "description"} <= set(head)
