"""Options of plug-ins without importing them: read from the generated `schema.json`.

`python -m trainer schema` writes that file from the plug-ins' own `Config` classes; a test fails
when it is stale. So the app checks a config completely without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, WrapValidator, create_model
from pydantic_core import PydanticCustomError

from trainer.contract.options import Options

SCHEMA_FILE = Path(__file__).with_name("schema.json")


@cache
def plugin_schemas() -> dict[str, dict[str, dict[str, Any]]]:
    """Return kind -> name -> JSON schema of the plug-in's options."""
    content: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    plugins: dict[str, dict[str, dict[str, Any]]] = content["plugins"]
    return plugins


def option_names(kind: str, name: str) -> frozenset[str]:
    """Return the option names of one plug-in; none for a name that is not in the schema."""
    return frozenset(plugin_schemas().get(kind, {}).get(name, {}).get("properties", {}))


def all_options(kind: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return every option of one plug-in: what is given, and the defaults of the others."""
    specs = plugin_schemas()[kind][name].get("properties", {})
    return {key: spec.get("default") for key, spec in specs.items()} | given


@cache
def option_model(kind: str, name: str) -> type[Options]:
    """Return a model that checks the options of one plug-in as its own `Config` would.

    Rules between fields live in the plug-in's `Config` and are checked when the job starts.
    """
    schema = plugin_schemas()[kind][name]
    return _model_of(f"{kind}_{name}", _with_definitions(schema, schema.get("$defs", {})))


class _Sourceless(Options):
    """A model that is made has no docstrings, for which pydantic would search every module."""

    model_config = ConfigDict(use_attribute_docstrings=False)


def _model_of(name: str, schema: dict[str, Any]) -> type[Options]:
    required = set(schema.get("required", ()))
    fields: dict[str, Any] = {}
    for key, spec in schema.get("properties", {}).items():
        default = ... if key in required else spec.get("default")
        fields[key] = (_python_type(spec), _field(spec, default))
    return create_model(name, __base__=_Sourceless, **fields)


def _with_definitions(spec: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema with each reference to one of its definitions replaced by it."""
    if isinstance(spec, list):
        return [_with_definitions(part, definitions) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if "$ref" in spec:
        return _with_definitions(definitions[spec["$ref"].rpartition("/")[2]], definitions)
    return {
        key: _with_definitions(part, definitions) for key, part in spec.items() if key != "$defs"
    }


_LIMITS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
    "pattern": "pattern",
}
_ARRAY_LIMITS = {"minItems": "min_length", "maxItems": "max_length"}
_PRIMITIVES: dict[str, type] = {
    "integer": int,
    "number": float,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "object": dict,
}


def _field(spec: dict[str, Any], default: Any) -> Any:
    # A nullable field carries its limits inside the non-null branch; pydantic skips them for None.
    branches = [part for part in spec.get("anyOf", ()) if part.get("type") != "null"]
    inner = branches[0] if len(branches) == 1 else spec
    return Field(default, description=spec.get("description"), **_limits(inner))


def _limits(spec: dict[str, Any]) -> dict[str, Any]:
    known = _ARRAY_LIMITS if spec.get("type") == "array" else _LIMITS
    return {ours: spec[theirs] for theirs, ours in known.items() if theirs in spec}


def _python_type(spec: dict[str, Any]) -> Any:
    if "const" in spec:
        return Literal[spec["const"]]
    if "enum" in spec:
        return Literal[tuple(spec["enum"])]
    if "anyOf" in spec:
        return _union(spec["anyOf"])
    if spec.get("type") == "array":
        items = spec.get("items") or (spec.get("prefixItems") or [{}])[0]
        item: Any = Annotated[_python_type(items), Field(**_limits(items))]
        return tuple[item, ...]
    if "properties" in spec:
        return _model_of(spec["title"], spec)
    if isinstance(values := spec.get("additionalProperties"), dict):
        value: Any = Annotated[_python_type(values), Field(**_limits(values))]
        return dict[str, value]
    if spec.get("format") == "path":
        return Path
    return _PRIMITIVES[spec["type"]] if "type" in spec else Any


def _union(branches: list[dict[str, Any]]) -> Any:
    several = sum(part.get("type") != "null" for part in branches) > 1
    union: Any = None
    for part in branches:
        own = _python_type(part)
        if several:  # else the field has the limits of its only branch
            own = Annotated[own, Field(**_limits(part))]
        union = own if union is None else union | own
    if not several:
        return union
    text = " or ".join(_in_words(part) for part in branches if part.get("type") != "null")

    def one_message(value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:  # it has a message for each branch
            raise PydanticCustomError("choice", "should be {text}", {"text": text}) from None

    return Annotated[union, WrapValidator(one_message)]


def _in_words(part: dict[str, Any]) -> str:
    if "const" in part:
        return json.dumps(part["const"])
    if "enum" in part:
        return " or ".join(json.dumps(value) for value in part["enum"])
    name = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}.get(
        str(part.get("type")), f"a {part.get('type', 'value')}"
    )
    low, high = part.get("minimum"), part.get("maximum")
    return name if low is None or high is None else f"{name} from {low} to {high}"
