"""Rewrite a LoRA in another layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import load_adapter
from trainer.adapters.base import AdapterFile, LoRAFactors, Update
from trainer.contract.errors import ConfigError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.jobs import ConvertRequest
from trainer.contract.lora_keys import Expert
from trainer.contract.lora_use import LoRAUse
from trainer.contract.loraid_metadata import of_expert
from trainer.jobs.lora_files import (
    check_distinct,
    check_same_model,
    expert_of,
    holds_both_experts,
    is_plain,
)
from trainer.jobs.lora_metadata import kept_metadata
from trainer.jobs.lora_output import (
    DTYPES,
    FOLDED_KEY,
    Target,
    check_output,
    common_dtype,
    dtype_name,
    in_dtype,
    is_power_of_two,
    matrices_in_dtype,
    write_lora,
    write_together,
)
from trainer.jobs.lora_pairs import write_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        expert: which part of a file with both experts it is; None: all of the file.
    """

    output: Path
    source_layout: str
    layout: str
    dtype: torch.dtype
    num_modules: int
    notes: tuple[str, ...]
    expert: Expert | None = None


def convert(request: ConvertRequest) -> list[ConvertReport]:
    """Do what a request asks: one file, a pair joined to one file, or a pair split into two.

    Raises:
        ConfigError: `join`, `split` and `expert` contradict each other, or as `convert_lora`.
        ModelFileError, DiskError: as `convert_lora`.
    """
    dtype = DTYPES[request.dtype] if request.dtype else None
    target = Target(path=request.output, layout=request.layout, dtype=dtype, force=request.force)
    chosen = [request.expert is not None, request.join is not None, request.split]
    if sum(chosen) > 1:
        raise ConfigError(
            "expert, join and split exclude each other",
            hint="--expert takes one part, --split both, --join adds the other expert",
        )
    if request.join is not None:
        return [join_experts(request.input, request.join, target)]
    if request.split:
        return split_experts(request.input, target)
    if request.expert is None and holds_both_experts(request.input):
        return [_convert_pair(request.input, target)]
    return [
        convert_lora(
            request.input,
            request.output,
            layout=request.layout,
            dtype=dtype,
            expert=request.expert,
            force=request.force,
        )
    ]


def convert_lora(
    source: Path,
    output: Path,
    *,
    layout: str = "comfy",
    dtype: torch.dtype | None = None,
    expert: Expert | None = None,
    force: bool = False,
) -> ConvertReport:
    """Write the LoRA in `source` to `output` in another layout; the update it makes is the same.

    `comfy` has no alpha: the scale is multiplied into one factor, which rounds it in 16 bits
    unless the scale is 2ⁿ. The header keeps the alphas, and a conversion to a layout with alpha
    takes them out again where that gives the original factors, bit for bit.

    Args:
        source: LoRA in any known layout.
        output: a .safetensors file.
        layout: `comfy`, `kohya` or `peft`.
        dtype: of the written factors; None: the most precise one in the file.
        expert: which LoRA to take from a file that holds two.
        force: replace `output` if it is there.

    Raises:
        ConfigError: `output` is there already or is the input, or there is no such layout.
        ModelFileError: the file cannot be read, or a value does not fit `dtype`.
        DiskError: the disk is full, read-only or faulty; `output` is as it was.
    """
    check_output(output, [source], force=force)
    adapter = load_adapter(source, expert=expert, differences=True)
    return _write(adapter, Target(path=output, layout=layout, dtype=dtype, force=force), expert)


def split_experts(source: Path, target: Target) -> list[ConvertReport]:
    """Write the parts of a file with both experts to OUT_high_noise and OUT_low_noise.

    Raises:
        ConfigError: the file has one part only, or as `convert_lora`.
    """
    outputs = {
        expert: target.path.with_name(f"{target.path.stem}_{expert}{target.path.suffix}")
        for expert in EXPERTS
    }
    for output in outputs.values():
        check_output(output, [source], force=target.force)
    if not holds_both_experts(source):
        raise ConfigError(f"{source} holds one LoRA", hint="leave --split out")
    adapters = {expert: load_adapter(source, expert=expert, differences=True) for expert in EXPERTS}
    reports: dict[Expert, ConvertReport] = {}

    def writer(expert: Expert) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            own = replace(target, path=path, force=True)
            reports[expert] = _write(adapters[expert], own, expert)

        return write

    write_together({outputs[expert]: writer(expert) for expert in EXPERTS})
    return [replace(reports[expert], output=outputs[expert]) for expert in EXPERTS]


def join_experts(first: Path, second: Path, target: Target) -> ConvertReport:
    """Write the LoRAs of the two experts into one file.

    Which is which is told by the headers, else by the names; one that says nothing is the other.

    Raises:
        ConfigError: that does not tell, or the layout has no place for two.
    """
    check_output(target.path, [first, second], force=target.force)
    uses = [LoRAUse(path=first), LoRAUse(path=second)]
    check_distinct(uses)
    adapters = [load_adapter(use.path, differences=True) for use in uses]
    check_same_model(adapters)
    told = [expert_of(use, adapter) for use, adapter in zip(uses, adapters, strict=True)]
    if told[0] == told[1]:
        what = (
            f"both are for the {told[0]} expert" if told[0] else "neither says which expert it is"
        )
        raise ConfigError(
            f"{first} and {second}: {what}",
            hint="put high_noise and low_noise into the names of the files",
        )
    high = 0 if told[0] == "high_noise" or told[1] == "low_noise" else 1
    pair: dict[Expert, AdapterFile] = {
        "high_noise": adapters[high],
        "low_noise": adapters[1 - high],
    }
    updates = {expert: restored(adapter) for expert, adapter in pair.items()}
    return _write_pair(pair, updates, target, adapters[0].layout)


def restored(adapter: AdapterFile, expert: Expert | None = None) -> dict[str, Update]:
    """Return the updates of a file with the alphas that were folded into its factors.

    Taken out only where that is exact: the scale is 2ⁿ, or folding the narrower original factors
    again gives every bit of the file. Else the update stays as it is.

    Args:
        adapter: the file.
        expert: which part of a file with both experts it is.
    """
    table = _folded(adapter.metadata, expert)
    if "alpha" not in table:
        return dict(adapter)
    narrow = next((d for d in DTYPES.values() if dtype_name(d) == table.get("dtype")), None)
    if narrow is None:
        return dict(adapter)
    return {
        name: _unfolded(update, _alpha(table, name), narrow) for name, update in adapter.items()
    }


def _alpha(table: Mapping[str, Any], name: str) -> float | None:
    alpha = table["alpha"]
    wanted = alpha.get(name) if isinstance(alpha, dict) else alpha
    return float(wanted) if isinstance(wanted, int | float) else None


def _unfolded(update: Update, alpha: float | None, narrow: torch.dtype) -> Update:
    if not (alpha and isinstance(update, LoRAFactors) and is_plain(update)):
        return update
    scale = alpha / update.rank
    if update.scale != 1.0 or update.up_OR.dtype.itemsize == 1:
        return update
    up_OR = (update.up_OR.float() / scale).to(narrow)
    down_RI = update.down_RI.to(narrow)
    again = LoRAFactors(down_RI, up_OR, alpha).folded()
    same = torch.equal(again.up_OR.to(update.up_OR.dtype), update.up_OR)
    same = same and torch.equal(down_RI.to(update.down_RI.dtype), update.down_RI)
    unique = is_power_of_two(abs(scale)) or narrow.itemsize < update.up_OR.dtype.itemsize
    return LoRAFactors(down_RI, up_OR, alpha) if same and unique else update


def _folded(metadata: Mapping[str, str], expert: Expert | None) -> dict[str, Any]:
    """Return the header's entry on folded alphas, {} where there is none that can be read."""
    try:
        table = json.loads(metadata.get(FOLDED_KEY, "{}"))
    except ValueError:
        return {}
    if isinstance(table, dict) and expert is not None:
        table = table.get(expert, table)
    return table if isinstance(table, dict) else {}


def _write(adapter: AdapterFile, target: Target, expert: Expert | None) -> ConvertReport:
    updates = dict(adapter) if target.layout == "comfy" else restored(adapter, expert)
    updates = matrices_in_dtype(updates, target.dtype)
    metadata = kept_metadata(adapter) | {
        "menma.converted_from": f"{adapter.layout}, {adapter.path.name}"
    }
    if target.layout == "comfy" and (table := _folded(adapter.metadata, expert)):
        metadata[FOLDED_KEY] = json.dumps(table)
    if expert is not None and "menma.expert" not in metadata:
        metadata = of_expert(metadata, expert)
    own = replace(target, dtype=target.dtype or common_dtype([updates]))
    differences = in_dtype(adapter.path, adapter.differences, target.dtype)
    written = write_lora(updates, own, [adapter], metadata, differences=differences)
    return ConvertReport(
        output=target.path,
        source_layout=adapter.layout,
        layout=written.layout,
        dtype=written.dtype,
        num_modules=len(adapter),
        notes=adapter.notes,
        expert=expert,
    )


def _convert_pair(source: Path, target: Target) -> ConvertReport:
    check_output(target.path, [source], force=target.force)
    pair = {expert: load_adapter(source, expert=expert, differences=True) for expert in EXPERTS}
    updates = {expert: restored(adapter, expert) for expert, adapter in pair.items()}
    return _write_pair(pair, updates, target, pair["high_noise"].layout)


def _write_pair(
    pair: Mapping[Expert, AdapterFile],
    updates: Mapping[Expert, Mapping[str, Update]],
    target: Target,
    source_layout: str,
) -> ConvertReport:
    layout = target.layout or "comfy"
    updates = {expert: matrices_in_dtype(own, target.dtype) for expert, own in updates.items()}
    kept = layout == "comfy" and target.dtype is None
    dtype = target.dtype or common_dtype(list(pair.values() if kept else updates.values()))
    differences = {
        expert: in_dtype(adapter.path, adapter.differences, target.dtype)
        for expert, adapter in pair.items()
    }
    write_pair(pair, updates, target.path, layout=layout, dtype=dtype, differences=differences)
    return ConvertReport(
        output=target.path,
        source_layout=source_layout,
        layout=layout,
        dtype=dtype,
        num_modules=sum(map(len, updates.values())),
        notes=tuple(note for adapter in pair.values() for note in adapter.notes),
    )
