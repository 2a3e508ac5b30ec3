"""What the header of a LoRA says after a tool has worked on it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.adapters.base import AdapterFile
from trainer.adapters.formats.peft_config import HEADER_KEY
from trainer.jobs.lora_output import FOLDED_KEY

HISTORY_KEY = "menma.history"
_OF_THE_TENSORS = (HEADER_KEY, FOLDED_KEY, "sshs_model_hash", "sshs_legacy_hash")
"""Describe the tensors of one file; whoever writes tensors writes them anew."""
_SLOT = "ss_loraid"
_LISTS = (_SLOT, f"{_SLOT}_units")
"""Of several LORAID slots the result has all."""


def kept_metadata(adapter: AdapterFile) -> dict[str, str]:
    """Return the header of a file without what describes its tensors."""
    return {key: value for key, value in adapter.metadata.items() if key not in _OF_THE_TENSORS}


def tool_metadata(adapter: AdapterFile, tool: str, **facts: Any) -> dict[str, str]:
    """Return the header of a LoRA made from one file: all that it said, and one more step.

    Args:
        adapter: the file.
        tool: name of the command.
        facts: what it was asked for; JSON values.
    """
    kept = kept_metadata(adapter)
    step = {"tool": tool, "files": [adapter.path.name], **facts}
    return {**kept, HISTORY_KEY: json.dumps([*history(kept), step])}


def combined_metadata(
    adapters: Sequence[AdapterFile], tool: str, **facts: Any
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the header of a LoRA made from several files, and notes for people.

    Kept is what all of them say alike. LORAID slots are listed (`ss_loraid = "1,2"`), if all of
    them are slots of one allocation; else the result is no slot any more.

    Args:
        adapters: the files.
        tool: name of the command.
        facts: what it was asked for; JSON values.
    """
    headers = [kept_metadata(adapter) for adapter in adapters]
    first, *others = headers
    kept = {
        key: value
        for key, value in first.items()
        if all(other.get(key) == value for other in others) and not key.startswith(_SLOT)
    }
    slots, notes = _slots(headers)
    names = [adapter.path.name for adapter in adapters]
    step = {"tool": tool, "files": names, **facts}
    before = [step for adapter_steps in map(history, headers) for step in adapter_steps]
    return {
        **kept,
        **slots,
        "modelspec.merged_from": ", ".join(names),
        HISTORY_KEY: json.dumps([*before, step]),
    }, (*notes, *_variant_notes(adapters))


def _slots(headers: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], tuple[str, ...]]:
    tables = [{k: v for k, v in header.items() if k.startswith(_SLOT)} for header in headers]
    if not any(tables):
        return {}, ()
    schemes = [{k: v for k, v in table.items() if k not in _LISTS} for table in tables]
    if not all(table.get(_SLOT) for table in tables) or any(s != schemes[0] for s in schemes):
        note = "the files are not all LORAID slots of one allocation: the result is marked as none"
        return {}, (note,)
    lists = {
        key: ",".join(sorted({table[key] for table in tables}, key=_numbers))
        for key in _LISTS
        if all(key in table for table in tables)
    }
    return {**schemes[0], **lists}, ()


def _numbers(text: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", text)], text


def _variant_notes(adapters: Sequence[AdapterFile]) -> tuple[str, ...]:
    told = {adapter.path.name: adapter.metadata.get("menma.variant") for adapter in adapters}
    named = {name: variant for name, variant in told.items() if variant}
    if len(set(named.values())) < 2:
        return ()
    listed = ", ".join(f"{name}: {variant}" for name, variant in named.items())
    return (f"trained on different models of one shape ({listed})",)


def history(metadata: Mapping[str, str]) -> list[Any]:
    """Return what tools have done to a LoRA before, the oldest step first."""
    try:
        steps = json.loads(metadata.get(HISTORY_KEY, "[]"))
    except ValueError:
        return []
    return steps if isinstance(steps, list) else []
