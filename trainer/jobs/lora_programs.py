"""Which programs load a LoRA file whole, by its layout, its kinds and its modules.

What diffusers 0.42 and ComfyUI do was found by running them on files of each sort; see
docs/lora-tools.md. musubi-tuner reads the names that it writes itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.adapters.base import AdapterFile
from trainer.adapters.difference import WeightDifference
from trainer.contract.layer_names import block_index
from trainer.contract.parameter_names import linear_of, stored_name

_WHOLE = WeightDifference.kind
_COMFY_KINDS = {"lora", "loha", "lokr", "dora", _WHOLE}
_MUSUBI_KINDS = {"lora", "loha", "lokr"}
_HALVES = ("self_attn.q", "cross_attn.q", "ffn.0")


def programs_that_load(
    adapter: AdapterFile, *, has_alpha: bool, both_experts: bool = False
) -> dict[str, dict[str, Any]]:
    """Return, for ComfyUI, diffusers and musubi-tuner, `loads` and, where it does not, `why`.

    Args:
        adapter: the file, or one part of it.
        has_alpha: it has alpha tensors.
        both_experts: it is a part of a file with both experts.
    """
    kinds = {update.kind for update in adapter.values()}
    layouts = set(adapter.layout.split("+"))
    found = {
        "ComfyUI": _comfyui(layouts, kinds, both_experts),
        "diffusers": _dropped_by_diffusers(adapter)
        or _diffusers(adapter, layouts, kinds, has_alpha, both_experts),
        "musubi-tuner": _musubi(layouts, kinds | ({_WHOLE} if adapter.differences else set())),
    }
    return {
        name: {"loads": not why, **({"why": why} if why else {})} for name, why in found.items()
    }


def _comfyui(layouts: set[str], kinds: set[str], both_experts: bool) -> str:
    if both_experts:
        return "it loads one expert a file: `menma lora convert --split`"
    if not layouts <= {"comfy", "kohya"}:
        return "it patches nothing with these names: convert to comfy or kohya"
    return _other_kind(kinds, _COMFY_KINDS)


def _diffusers(
    adapter: AdapterFile, layouts: set[str], kinds: set[str], has_alpha: bool, both_experts: bool
) -> str:
    if kinds == {"dora"}:
        return "" if layouts == {"peft"} else "of DoRA it reads the peft layout only"
    if other := _other_kind(kinds, {"lora"}):
        return other
    if len(layouts) > 1 or "bare" in layouts:
        return "it needs one known prefix: convert to comfy or peft"
    if layouts == {"peft"}:
        return "with alpha tensors it needs other names: convert to peft" if has_alpha else ""
    if both_experts:
        return "it needs its own names for two experts: convert to peft"
    outside = [name for name in adapter if block_index(name) is None]
    if outside and has_alpha:
        return f"it fails on alpha outside of the blocks ({outside[0]}): convert to comfy"
    if layouts == {"kohya"}:
        return _diffusers_kohya(adapter, outside, has_alpha)
    return ""


def _dropped_by_diffusers(adapter: AdapterFile) -> str:
    """Say which whole difference diffusers does not use; it takes those of biases beside LoRAs."""
    for name in adapter.differences:
        if linear_of(name) not in adapter or adapter.layout != "comfy":
            return f"it leaves out {stored_name(name)}: merge it into the model (`menma merge`)"
    return ""


def _diffusers_kohya(adapter: Mapping[str, Any], outside: list[str], has_alpha: bool) -> str:
    if outside or not has_alpha:
        return "it cannot convert these kohya names: convert to comfy"
    blocks = {index for name in adapter if (index := block_index(name)) is not None}
    gaps = blocks != set(range(len(blocks)))
    lacks = any(f"blocks.{index}.{half}" not in adapter for index in blocks for half in _HALVES)
    if gaps or lacks:
        return "of kohya names it needs whole blocks from block 0 on: convert to comfy"
    return ""


def _musubi(layouts: set[str], kinds: set[str]) -> str:
    if _WHOLE in kinds:
        return "it does not know whole differences (.diff)"
    if layouts != {"kohya"}:
        return "it is sure to read kohya names only: convert to kohya"
    return _other_kind(kinds, _MUSUBI_KINDS)


def _other_kind(kinds: Iterable[str], known: set[str]) -> str:
    other = sorted(set(kinds) - known)
    return f"it does not know the kind {', '.join(other)}" if other else ""
