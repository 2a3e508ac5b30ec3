"""The job `lora_ema`: the average of the files that one run saved on its way."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adapters import load_adapter
from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.formats.peft_config import HEADER_KEY
from trainer.adapters.formats.writer import model_hash
from trainer.adapters.low_rank import Cut, truncate, weighted_sum
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.jobs import LoRAEmaRequest
from trainer.contract.lora_use import LoRAUse
from trainer.io.atomic_save import save_safetensors
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.jobs.base import Emit
from trainer.jobs.ema_weights import constant_betas, file_weights, linear_betas, power_betas
from trainer.jobs.lora_files import (
    check_distinct,
    check_same_expert,
    check_same_model,
    holds_both_experts,
    lora_file,
    low_rank,
)
from trainer.jobs.lora_metadata import HISTORY_KEY, history, lost_notes, tool_metadata
from trainer.jobs.lora_output import DTYPES, Target, check_output, dtype_name, write_lora
from trainer.jobs.lora_sum import Energies

DEFAULT_BETA = 0.95
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")
_MOSTLY_ONE = 0.6
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """An average that was written.

    Attributes:
        weights: file name and what it counted, in the order of averaging.
        energies: empty unless updates were averaged and cut.
    """

    path: Path
    dtype: torch.dtype
    num_modules: int
    weights: list[tuple[str, float]]
    energies: Energies


def run(request: LoRAEmaRequest, emit: Emit) -> None:
    """Job `lora_ema`; its `output` event has what each file counted."""
    files = ordered(request.files) if request.sort else list(request.files)
    weights = file_weights(betas_of(request))
    emit("phase", name="average", detail=f"{len(files)} files")
    if weights[0] > _MOSTLY_ONE:
        emit(
            "warning",
            message=f"the oldest file, {files[0].name}, counts {100 * weights[0]:.0f} %",
            hint="of few files --sigma-rel 0.2 keeps the newer ones",
        )
    check_output(request.output, files, force=request.force)
    average = average_exactly if request.exact else average_factors
    result = average(files, weights, request.output, request.dtype, emit)
    emit(
        "output",
        path=str(result.path),
        dtype=dtype_name(result.dtype),
        num_modules=result.num_modules,
        num_bytes=result.path.stat().st_size,
        weights=[{"file": name, "weight": weight} for name, weight in result.weights],
        **result.energies.fields(),
    )


def betas_of(request: LoRAEmaRequest) -> list[float]:
    """Return β₂…βₙ as the request asks.

    Raises:
        ConfigError: two ways at once, or sigma_rel outside its domain.
    """
    count = len(request.files)
    if request.sigma_rel is not None:
        if request.beta is not None or request.beta2 is not None:
            raise ConfigError(
                "sigma_rel and beta are given, two ways to weigh the files", hint="give one of them"
            )
        return power_betas(count, request.sigma_rel)
    beta = DEFAULT_BETA if request.beta is None else request.beta
    if request.beta2 is not None:
        return linear_betas(count, beta, request.beta2)
    return constant_betas(count, beta)


def ordered(files: Sequence[Path]) -> list[Path]:
    """Return the files from the oldest to the newest: by steps in the headers, else by name.

    Names are compared with their numbers as numbers. Times of files are not used: a copy has the
    time at which it was copied.
    """
    steps = {path: _step(open_weights(lora_file(path)).metadata) for path in files}
    by_name = sorted(files, key=_natural)
    if any(step is None for step in steps.values()) or len(set(steps.values())) < len(files):
        return by_name
    return sorted(by_name, key=lambda path: steps[path] or 0)


def average_factors(
    files: Sequence[Path], weights: Sequence[float], output: Path, dtype: str | None, emit: Emit
) -> Average:
    """Average each tensor of the files by itself, in float64; alpha must be equal in all.

    That is not the average of the updates, and close to it because files of one run are close to
    each other. Any kind of adapter and any layout; keys, layout and header are the last file's.

    Raises:
        ConfigError: a file is given twice.
        ModelFileError: a file cannot be read, or is not of the same LoRA; names file and key.
        DiskError: the disk is full, read-only or faulty; the output is as it was.
    """
    num_modules = _check_readable(files)
    opened = [open_weights(lora_file(path)) for path in files]
    _check_same_keys(opened)
    last = opened[-1]
    tensors: dict[str, Tensor] = {}
    for number, key in enumerate(last, start=1):
        tensors[key] = _average(key, opened, weights, DTYPES[dtype] if dtype else None)
        emit("phase", name="average", done=number, total=len(last), detail=key)
    metadata = {key: value for key, value in last.metadata.items() if key not in _HASHES}
    step = {"tool": "ema", "files": [path.name for path in files], "weights": list(weights)}
    metadata[HISTORY_KEY] = json.dumps([*history(metadata), step])
    metadata["sshs_model_hash"] = model_hash(tensors)
    save_safetensors(tensors, output, metadata)
    return Average(
        path=output,
        dtype=_widest(tensors),
        num_modules=num_modules,
        weights=_named(files, weights),
        energies=Energies(),
    )


def average_exactly(
    files: Sequence[Path], weights: Sequence[float], output: Path, dtype: str | None, emit: Emit
) -> Average:
    """Average the updates: joined factors, cut to the rank of the last file by SVD.

    Raises:
        ConfigError, ModelFileError, DiskError: as `average_factors`; also a kind without factors.
    """
    uses = [LoRAUse(path=path) for path in files]
    check_distinct(uses)
    adapters = [load_adapter(path) for path in files]
    _check_modules(adapters)
    check_same_model(adapters)
    check_same_expert(uses, adapters)
    tables = [low_rank(adapter, "the exact average") for adapter in adapters]
    updates: dict[str, Update] = {}
    energies = Energies()
    for number, (name, newest) in enumerate(tables[-1].items(), start=1):
        parts = [(table[name], weight) for table, weight in zip(tables, weights, strict=True)]
        result = truncate(weighted_sum(parts), Cut(max_rank=newest.rank))
        updates[name] = result.factors
        energies.add(name, result)
        emit("phase", name="average", done=number, total=len(tables[-1]), detail=name)
    for note in lost_notes(adapters[-1:]):
        emit("log", message=note)
    metadata = tool_metadata(adapters[-1], "ema", exact=True, weights=list(weights))
    target = Target(path=output, dtype=DTYPES[dtype] if dtype else None, force=True)
    written = write_lora(updates, target, [adapters[-1]], metadata)
    return Average(
        path=output,
        dtype=written.dtype,
        num_modules=written.num_modules,
        weights=_named(files, weights),
        energies=energies,
    )


def _check_readable(files: Sequence[Path]) -> int:
    """Read every file once, one at a time; return the modules of the last."""
    uses = [LoRAUse(path=path) for path in files]
    check_distinct(uses)
    read: list[AdapterFile] = []
    for path in files:
        parts = EXPERTS if holds_both_experts(path) else (None,)
        loaded = [load_adapter(path, expert=expert, differences=True) for expert in parts]
        if not read:
            read = loaded
        check_same_model([read[0], loaded[0]])
        check_same_expert([LoRAUse(path=read[0].path), LoRAUse(path=path)], [read[0], loaded[0]])
    return sum(len(part) for part in loaded)


def _check_same_keys(opened: Sequence[WeightFiles]) -> None:
    first = opened[0]
    for other in opened[1:]:
        odd = [key for key in {**first, **other} if key not in first or key not in other]
        if odd:
            raise ModelFileError(
                f"{first.path} and {other.path} are not of one LoRA: {odd[0]} is in one of them "
                "only",
                hint="give files that one run saved",
            )
        wrong = [key for key in first if first[key].shape != other[key].shape]
        if wrong:
            key = wrong[0]
            raise ModelFileError(
                f"{first.path} and {other.path} are not of one LoRA: {key} is {first[key].shape} "
                f"in the one and {other[key].shape} in the other",
                hint="give files that one run saved",
            )
        if first.metadata.get(HEADER_KEY) != other.metadata.get(HEADER_KEY):
            raise ModelFileError(
                f"{first.path} and {other.path} have different scales in their headers",
                hint="give files that one run saved, or --exact",
            )


def _average(
    key: str, opened: Sequence[WeightFiles], weights: Sequence[float], dtype: torch.dtype | None
) -> Tensor:
    tensors = [files.read(key) for files in opened]
    last = tensors[-1]
    if key.endswith(".alpha") or not last.is_floating_point():
        for files, tensor in zip(opened, tensors, strict=True):
            if not torch.equal(tensor.double(), last.double()):
                raise ModelFileError(
                    f"{files.path}: {key} is {tensor.tolist()}, in {opened[-1].path} "
                    f"{last.tolist()}",
                    hint="only factors of one scale can be averaged; --exact averages the updates",
                )
        return last.clone()
    total = torch.zeros(last.shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total.to(dtype or last.dtype)


def _check_modules(adapters: Sequence[AdapterFile]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        odd = set(first) ^ set(other)
        if odd:
            raise ModelFileError(
                f"{first.path} and {other.path} are not of one LoRA: {min(odd)} is in one of them "
                "only",
                hint="give files that one run saved",
            )


def _step(metadata: dict[str, str]) -> int | None:
    text = metadata.get("ss_steps", metadata.get("ss_epoch", ""))
    return int(text) if text.isdigit() else None


def _natural(path: Path) -> list[Any]:
    parts = _DIGITS.split(path.name)
    return [int(part) if part.isdigit() else part for part in parts]


def _widest(tensors: dict[str, Tensor]) -> torch.dtype:
    return next(
        (t.dtype for key, t in tensors.items() if not key.endswith(".alpha")), torch.float32
    )


def _named(files: Sequence[Path], weights: Sequence[float]) -> list[tuple[str, float]]:
    return [(path.name, weight) for path, weight in zip(files, weights, strict=True)]
