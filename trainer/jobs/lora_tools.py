"""The jobs `merge`, `convert` and `inspect`: from their requests to events."""

from __future__ import annotations

import json
from typing import Any

import torch

from trainer.contract.jobs import ConvertRequest, InspectRequest, MergeRequest
from trainer.jobs.base import Emit
from trainer.jobs.convert import convert_lora
from trainer.jobs.inspect_lora import inspect_lora
from trainer.jobs.loraid_files import loras_to_merge
from trainer.jobs.merge import merge_loras

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONGEST_VALUE = 2000
_METADATA_BYTES = 32 * 1024


def run_merge(request: MergeRequest, emit: Emit) -> None:
    """Job `merge`; its `output` event has the path and the numbers of tensors."""
    emit("phase", name="merge", detail=request.base.name)
    report = merge_loras(
        request.base,
        loras_to_merge(request),
        request.output,
        dtype=_DTYPES[request.dtype] if request.dtype else None,
        force=request.force,
    )
    emit(
        "output",
        path=str(report.output),
        num_tensors=report.num_tensors,
        num_changed=report.num_changed,
        num_bytes=report.num_bytes,
    )


def run_convert(request: ConvertRequest, emit: Emit) -> None:
    """Job `convert`; its `output` event has the path and both layouts."""
    report = convert_lora(
        request.input,
        request.output,
        layout=request.layout,
        dtype=_DTYPES[request.dtype] if request.dtype else None,
        expert=request.expert,
        force=request.force,
    )
    for note in report.notes:
        emit("log", message=note)
    emit(
        "output",
        path=str(report.output),
        source_layout=report.source_layout,
        layout=report.layout,
        dtype=str(report.dtype).removeprefix("torch."),
        num_modules=report.num_modules,
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
