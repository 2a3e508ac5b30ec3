"""The job `lora_merge`: several LoRAs become one that acts like all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.low_rank import Cut
from trainer.contract.errors import ModelFileError
from trainer.contract.jobs import LoRAMergeRequest, LoRAOutput
from trainer.contract.lora_use import LoRAUse
from trainer.contract.loraid_metadata import only_held
from trainer.jobs.base import Emit
from trainer.jobs.lora_files import open_loras, union
from trainer.jobs.lora_metadata import combined_metadata, lost_notes, tool_metadata
from trainer.jobs.lora_output import (
    DTYPES,
    Target,
    Written,
    check_output,
    in_dtype,
    matrices_in_dtype,
    write_lora,
)
from trainer.jobs.lora_sum import (
    Energies,
    cut_of,
    rank_counts,
    sum_differences,
    sum_module,
    weighted_parts,
)

OnModule = Callable[[int, int, str], None]
"""Told of (done, total, module)."""


@dataclass(frozen=True, slots=True)
class Summed:
    """A LoRA that was summed and written."""

    written: Written
    ranks: dict[str, int]
    energies: Energies
    notes: tuple[str, ...]


def run(request: LoRAMergeRequest, emit: Emit) -> None:
    """Job `lora_merge`; its `output` event has path, ranks and the energy that a cut left."""
    emit("phase", name="merge", detail=f"{len(request.loras)} LoRAs")
    summed = merge_lora_files(
        request.loras,
        target_of(request),
        cut=cut_of(request),
        on_module=counting(emit, "merge"),
    )
    emit_summed(summed, emit)


def merge_lora_files(
    uses: Sequence[LoRAUse],
    target: Target,
    *,
    cut: Cut | None = None,
    on_module: OnModule | None = None,
) -> Summed:
    """Write Σ strength · LoRA as one LoRA.

    Exact: the factors are joined, so that the rank of a module is the sum of the ranks. A cut
    takes the smallest singular values off. The order of the files does not matter: they are
    summed in the order of their names, bit for bit.

    Raises:
        ConfigError: a file is given twice, the output is there already or is an input.
        ModelFileError: a file cannot be read, or they are of different models or experts.
        DiskError: the disk is full, read-only or faulty; the output is as it was.
    """
    check_output(target.path, [use.path for use in uses], force=target.force)
    uses = sorted(uses, key=lambda use: (use.path.name, str(use.path), use.expert or ""))
    adapters = open_loras(uses, differences=True)
    strengths = [use.strength for use in uses]
    return sum_and_write(adapters, strengths, target, cut or Cut(), "merge", on_module)


def sum_and_write(
    adapters: Sequence[AdapterFile],
    weights: Sequence[float],
    target: Target,
    cut: Cut,
    tool: str,
    on_module: OnModule | None = None,
) -> Summed:
    """Sum what was read and write it; see `merge_lora_files`."""
    names = union(adapters)
    updates: dict[str, Update] = {}
    energies = Energies()
    for number, name in enumerate(names, start=1):
        update = sum_module(name, weighted_parts(adapters, weights, name), cut, energies)
        if update is not None:
            updates[name] = update
        if on_module is not None:
            on_module(number, len(names), name)
    differences = sum_differences(adapters, weights)
    if not updates and not differences:
        raise ModelFileError(
            f"nothing is left of {', '.join(str(adapter.path) for adapter in adapters)}",
            hint="at least one strength must differ from 0",
        )
    facts = {"strengths": list(weights)}
    notes: tuple[str, ...] = ()
    if len(adapters) == 1:
        metadata = tool_metadata(adapters[0], tool, **facts)
    else:
        metadata, notes = combined_metadata(adapters, tool, **facts)
    metadata = only_held(metadata, updates)
    written = write_lora(
        matrices_in_dtype(updates, target.dtype),
        target,
        adapters,
        metadata,
        exact=not energies.kept,
        differences=in_dtype(target.path, differences, target.dtype),
    )
    named = (note for adapter in adapters for note in _named(adapter))
    notes = (*named, *lost_notes(adapters), *notes, *written.notes)
    return Summed(written, rank_counts(updates), energies, notes)


def target_of(request: LoRAOutput) -> Target:
    """Return what a request says of its output."""
    return Target(
        path=request.output,
        layout=request.layout,
        dtype=DTYPES[request.dtype] if request.dtype else None,
        force=request.force,
    )


def counting(emit: Emit, name: str) -> OnModule:
    """Return a callback that sends counted phases."""

    def on_module(done: int, total: int, module: str) -> None:
        emit("phase", name=name, done=done, total=total, detail=module)

    return on_module


def emit_summed(summed: Summed, emit: Emit) -> None:
    """Say what was written."""
    for note in summed.notes:
        emit("log", message=note)
    emit("output", **summed.written.fields(), ranks=summed.ranks, **summed.energies.fields())


def _named(adapter: AdapterFile) -> list[str]:
    return [f"{adapter.path.name}: {note}" for note in adapter.notes]
