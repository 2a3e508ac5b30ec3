"""Every option is documented, generated files are fresh, shipped files are valid."""

from __future__ import annotations

import ast
import re
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


def read_names() -> set[str]:
    """Return the names of attributes that some code reads, and the words it looks things up by."""
    found: set[str] = set()
    for path in [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "app").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Subscript):
                found |= words(node.slice)
            elif isinstance(node, ast.Call):
                found.update(*map(words, node.args))
    return found


def words(node: ast.expr) -> set[str]:
    """Return the string that a node is, or those of the tuple that it is."""
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return {
        part.value for part in parts if isinstance(part, ast.Constant) and type(part.value) is str
    }


def options_that_are_set() -> Iterator[tuple[str, str]]:
    """Yield where each option is declared and its name."""
    plugins = [
        registry.load(entry.name).Config for registry in PLUGIN_KINDS.values() for entry in registry
    ]
    for model in (RunConfig, GeneralOptions, SourceOptions, *plugins):
        for part in models_within(model):
            yield from ((part.__name__, name) for name in part.model_fields)


def test_no_option_is_there_that_no_code_reads():
    read = read_names()
    assert {(where, name) for where, name in options_that_are_set() if name not in read} == set()


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


GENERAL = (
    "test_importing.py", "test_config_io.py", "test_config_document.py", "test_config_screen.py",
    "test_presets_and_templates.py", "test_options.py",
)  # fmt: skip
"""Tests of configs as such: an option that they name may still do nothing."""


def sections() -> Iterator[tuple[str, str]]:
    """Yield section and name of each option of the config, not those of plug-ins."""
    for section, field in RunConfig.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                for model in models_within(part):
                    yield from ((section, name) for name in model.model_fields)
    yield from (("general", name) for name in GeneralOptions.model_fields)
    yield from (("sources", name) for name in SourceOptions.model_fields)


def test_every_option_is_in_a_test_of_what_it_does():
    """That it changes something is for each test to show; plug-ins have tables for that."""
    texts = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in GENERAL
    ]
    spelled = re.compile(r"(\w+?)__(\w+)\b|\b(\w+)\.(\w+)\b|[\"'](\w+)[\"']\s*:|\b(\w+)\s?=")
    pairs: set[tuple[str, str]] = set()
    names: set[str] = set()
    for text in texts:
        for match in spelled.finditer(text):
            pairs |= {(match[1], match[2]), (match[3], match[4])}
            names |= {match[5], match[6]}
    missing = {
        f"{section}.{name}"
        for section, name in sections()
        if (section, name) not in pairs and name not in names
    }
    assert missing == set()
