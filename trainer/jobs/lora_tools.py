"""The jobs `merge`, `convert` and `inspect`: from their requests to events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.contract.jobs import ConvertRequest, InspectRequest, MergeRequest
from trainer.contract.lora_keys import Expert
from trainer.jobs.base import Emit
from trainer.jobs.convert import convert
from trainer.jobs.inspect_lora import inspect_lora
from trainer.jobs.lora_output import DTYPES, dtype_name
from trainer.jobs.loraid_files import loras_to_merge
from trainer.jobs.merge import MergeProgress, MergeReport, merge_loras, merge_pair

_LONGEST_VALUE = 2000
_METADATA_BYTES = 24 * 1024


def run_merge(request: MergeRequest, emit: Emit) -> None:
    """Job `merge`; an `output` event a file: path, numbers of tensors, what rounding has cost."""
    dtype = DTYPES[request.dtype] if request.dtype else None
    loras = loras_to_merge(request)
    if request.base_high_noise is None:
        progress = MergeProgress(emit, request.base.name)
        report = merge_loras(
            request.base,
            loras,
            request.output,
            dtype=dtype,
            force=request.force,
            on_plan=progress.begin,
            on_tensor=progress.tensor,
        )
        reports = [report]
    else:
        bases: dict[Expert, Path] = {
            "high_noise": request.base_high_noise,
            "low_noise": request.base,
        }
        reports = merge_pair(
            bases, loras, request.output, dtype=dtype, force=request.force, emit=emit
        )
    for report in reports:
        emit_merged(report, emit)


def emit_merged(report: MergeReport, emit: Emit) -> None:
    """Say what was written, and warn where rounding has cost much of the LoRA."""
    for note in report.notes:
        emit("warning", message=note)
    if words := report.rounding.warning():
        emit("warning", message=words, hint="--dtype bf16 writes a more precise, larger file")
    emit(
        "output",
        path=str(report.output),
        num_tensors=report.num_tensors,
        num_changed=report.num_changed,
        num_bytes=report.num_bytes,
        rounding=report.rounding.fields(),
    )


def run_convert(request: ConvertRequest, emit: Emit) -> None:
    """Job `convert`; an `output` event a file, with the path and both layouts."""
    emit("phase", name="convert", detail=request.input.name)
    for report in convert(request):
        for note in report.notes:
            emit("log", message=note)
        emit(
            "output",
            path=str(report.output),
            source_layout=report.source_layout,
            layout=report.layout,
            dtype=dtype_name(report.dtype),
            num_modules=report.num_modules,
            expert=report.expert,
        )


def run_inspect(request: InspectRequest, emit: Emit) -> None:
    """Job `inspect`; its `output` event has the summary of `inspect_lora` under `lora`."""
    summary = inspect_lora(request.path, expert=request.expert)
    summary["metadata"] = _shortened(summary["metadata"])
    emit("output", path=str(request.path), lora=summary)


def _shortened(metadata: dict[str, str]) -> dict[str, Any]:
    # An event line is limited; some trainers write every caption into the header. Sorted, because
    # a safetensors header is read in no particular order; one overlong key hides only itself.
    short: dict[str, Any] = {}
    room = _METADATA_BYTES
    for key, value in sorted(metadata.items()):
        whole = len(value) <= _LONGEST_VALUE
        text = value if whole else f"{value[:200]}… ({len(value)} characters)"
        size = len(json.dumps({key: text}))
        if size <= room:
            room -= size
            short[key] = text
    if len(short) < len(metadata):
        short["…"] = f"and {len(metadata) - len(short)} more keys"
    return short
