"""From files of another trainer to the text of a config and a word on every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.domain.importing.draft import Draft
from app.domain.importing.reading import Input, Tool, read_input
from app.domain.importing.report import Imported, Row
from app.domain.importing.tables import Keys, Table, read_table
from app.domain.template import render_values
from trainer.contract.toml_lines import key_lines

_WIDTH = 96


def import_config(
    files: Sequence[Path], *, command: str | None = None, tool: Tool | None = None
) -> Imported:
    """Return a config of Menma made of another trainer's; nothing is written.

    Args:
        files: its configs and scripts.
        command: a command line instead, or besides.
        tool: which trainer; None: found out by what is in the files.

    Raises:
        UserError: a file cannot be read, or is of no trainer that is known.
    """
    return convert(read_input(files, command, tool))


def convert(given: Input) -> Imported:
    """Return the config of keys that were read."""
    table, defaults = _table(given.tool)
    draft = Draft(table.tool)
    draft.notes += given.notes
    folders = tuple(dict.fromkeys(file.parent for file in given.files))
    read_table(table, Keys(draft, given.values, given.origins, folders, defaults))
    _complete(draft)
    draft.settle()
    nested = draft.nested()
    name = str(nested.pop("name", "imported"))
    return Imported(
        tool=given.tool,
        name=name,
        text=_text(table.tool, name, nested, draft, given.files),
        rows=draft.rows,
        defaults=draft.defaults,
        files=given.files,
        notes=list(dict.fromkeys(draft.notes)),
    )


def _table(tool: Tool) -> tuple[Table, Mapping[str, Any]]:
    if tool == "musubi":
        from app.domain.importing import musubi

        return musubi.TABLE, {}
    if tool == "takenoko":
        from app.domain.importing import takenoko

        return takenoko.TABLE, takenoko.DEFAULTS
    if tool == "diffusion-pipe":
        from app.domain.importing import diffusion_pipe

        return diffusion_pipe.TABLE, {}
    from app.domain.importing import simpletuner

    return simpletuner.TABLE, {}


def _complete(draft: Draft) -> None:
    """Add what the values need in Menma, and take out what they exclude."""
    values = draft.values
    if "dataset.file" in values:  # it has tables of its own
        for path in [p for p in values if p.startswith(("dataset.general", "dataset.sour"))]:
            del values[path]
    elif not any(path.startswith("dataset.sources") for path in values):
        draft.notes.append("no clips are named: put them into [[dataset.sources]]")
    whole_model = values.get("adapter.kind") == "none"
    if whole_model and values.get("memory.weight_format", "bf16") == "bf16":
        values.setdefault("distributed.zero_stage", 2)
        draft.notes.append(
            "a whole model is trained: DeepSpeed keeps its fp32 masters with zero_stage = 2"
        )


def _text(tool: str, name: str, nested: dict[str, Any], draft: Draft, files: Sequence[Path]) -> str:
    dataset = nested.get("dataset", {})
    if "file" not in dataset:
        nested["dataset"] = {"general": dataset.get("general", {}), **dataset}
        if not dataset.get("sources"):
            nested["dataset"].pop("sources", None)
    of = ", ".join(file.name for file in files) or "a command line"
    text = render_values(name, nested, origin=f", imported from {tool} ({of})")
    return _with_reasons(text, draft) + "".join(f"{line}\n" for line in _leftovers(tool, draft))


def _with_reasons(text: str, draft: Draft) -> str:
    """Write behind each value which key it comes from."""
    reasons: dict[str, list[str]] = {}
    for row in draft.rows:
        if row.target and row.target in draft.values and row.status != "carried":
            reasons.setdefault(row.target, []).append(row.key)
    for default in draft.defaults:
        reasons.setdefault(default.target, []).append(f"{default.key} left out: its default there")
    places = key_lines(text)
    lines = text.splitlines()
    for target, keys in reasons.items():
        place = places.get(target)
        if place is not None:
            lines[place - 1] += f"  # {', '.join(dict.fromkeys(keys))}"
    return "\n".join(lines) + "\n"


def _leftovers(tool: str, draft: Draft) -> list[str]:
    """Return what is not carried over, as comments."""
    lost = [row for row in draft.rows if row.is_lost]
    lines = []
    if draft.notes:
        lines += ["", "# To do:"]
        lines += [f"# - {_one_line(note)}" for note in dict.fromkeys(draft.notes)]
    if lost:
        lines += ["", f"# Keys of {tool} that are not carried over:"]
        lines += [f"#   {_leftover(row)}" for row in lost]
    return lines


def _leftover(row: Row) -> str:
    words = row.note + (f"; {row.hint}" if row.hint else "")
    value = shorten(row.value, 60)
    return _one_line(f"{row.key} = {value}: {words}")


def shorten(value: Any, width: int) -> str:
    """Return a value on one line, cut to a width."""
    shown = _one_line(value if isinstance(value, str) else repr(value))
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
