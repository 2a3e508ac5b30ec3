"""What the header of a LoRA says after a tool has worked on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.adapters.base import AdapterFile
from trainer.adapters.formats.peft_config import HEADER_KEY
from trainer.contract.adapter_start import STATE_KEYS, TLORA_KEY
from trainer.contract.loraid_metadata import joined_loraid
from trainer.jobs.lora_output import FOLDED_KEY

HISTORY_KEY = "menma.history"
_OF_THE_TENSORS = (HEADER_KEY, FOLDED_KEY, "sshs_model_hash", "sshs_legacy_hash")
"""Describe the tensors of one file; whoever writes tensors writes them anew."""
_SLOT = "ss_loraid"


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
    for key in STATE_KEYS.values():  # no longer true when ranks are joined, cut or scaled
        kept.pop(key, None)
    step = {"tool": tool, "files": [adapter.path.name], **facts}
    return {**kept, HISTORY_KEY: json.dumps([*history(kept), step])}


def combined_metadata(
    adapters: Sequence[AdapterFile], tool: str, **facts: Any
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the header of a LoRA made from several files, and notes for people.

    Kept is what all of them say alike. LORAID slots are listed (`ss_loraid = "1,2"`).

    Args:
        adapters: the files.
        tool: name of the command.
        facts: what it was asked for; JSON values.
    """
    headers = [kept_metadata(adapter) for adapter in adapters]
    for header in headers:
        for key in STATE_KEYS.values():
            header.pop(key, None)
    first, *others = headers
    kept = {
        key: value
        for key, value in first.items()
        if all(other.get(key) == value for other in others) and not key.startswith(_SLOT)
    }
    names = [adapter.path.name for adapter in adapters]
    step = {"tool": tool, "files": names, **facts}
    before = [step for adapter_steps in map(history, headers) for step in adapter_steps]
    return {
        **kept,
        **joined_loraid(headers),
        "modelspec.merged_from": ", ".join(names),
        HISTORY_KEY: json.dumps([*before, step]),
    }, _variant_notes(adapters)


def lost_notes(adapters: Sequence[AdapterFile]) -> tuple[str, ...]:
    """Return what of the files a tool that changes ranks cannot keep, for people."""
    return tuple(
        f"{adapter.path.name} is a T-LoRA: in the result all ranks act at every timestep"
        for adapter in adapters
        if TLORA_KEY in adapter.metadata
    )


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
