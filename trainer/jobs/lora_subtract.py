"""The job `lora_subtract`: take LoRAs out of a model they were merged into, or out of a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.adapters.low_rank import Cut
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import LoRASubtractRequest
from trainer.contract.lora_use import LoRAUse
from trainer.io.mapped_load import open_weights
from trainer.jobs.base import Emit
from trainer.jobs.lora_files import is_transformer, open_loras
from trainer.jobs.lora_merge import (
    OnModule,
    Summed,
    counting,
    emit_summed,
    sum_and_write,
    target_of,
)
from trainer.jobs.lora_output import DTYPES, Target, check_output
from trainer.jobs.lora_sum import cut_of
from trainer.jobs.lora_tools import emit_merged
from trainer.jobs.merge import MergeReport, merge_loras
from trainer.jobs.merge_weights import merged_before


def run(request: LoRASubtractRequest, emit: Emit) -> None:
    """Job `lora_subtract`; its `output` event is that of `merge` or that of `lora_merge`."""
    cut = cut_of(request)
    if not is_transformer(request.minuend):
        minuend = LoRAUse(path=request.minuend, expert=request.expert)
        summed = subtract_from_lora(
            minuend,
            request.loras,
            target_of(request),
            cut=cut,
            on_module=counting(emit, "subtract"),
        )
        emit_summed(summed, emit)
        return
    if cut.limits or request.layout:
        raise ConfigError(
            f"{request.minuend} is a base model: rank, energy and layout are for LoRAs",
            hint="leave them out",
        )
    for note in missing_merges(request.minuend, request.loras):
        emit("warning", message=note)
    report = subtract_from_base(
        request.minuend,
        request.loras,
        request.output,
        dtype=request.dtype,
        force=request.force,
        emit=emit,
    )
    emit_merged(report, emit)


def subtract_from_lora(
    minuend: LoRAUse,
    uses: Sequence[LoRAUse],
    target: Target,
    *,
    cut: Cut | None = None,
    on_module: OnModule | None = None,
) -> Summed:
    """Write minuend − Σ strength · LoRA as one LoRA, by joined factors with negative sign.

    Raises:
        ConfigError, ModelFileError, DiskError: as `merge_lora_files`.
    """
    everything = [minuend, *uses]
    check_output(target.path, [use.path for use in everything], force=target.force)
    adapters = open_loras(everything, differences=True)
    weights = [1.0, *(-use.strength for use in uses)]
    return sum_and_write(adapters, weights, target, cut or Cut(), "subtract", on_module)


def subtract_from_base(
    base: Path,
    uses: Sequence[LoRAUse],
    output: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    emit: Emit,
) -> MergeReport:
    """Write W − Σ strength · delta; what a merge had rounded away does not come back.

    Raises:
        ConfigError, ModelFileError, DiskError: as `merge_loras`.
    """
    done = [0, 0]

    def begin(total: int) -> None:
        done[1] = total

    def on_tensor(name: str) -> None:
        done[0] += 1
        emit("phase", name="subtract", done=done[0], total=done[1], detail=name)

    negative = [use.model_copy(update={"strength": -use.strength}) for use in uses]
    return merge_loras(
        base,
        negative,
        output,
        dtype=DTYPES[dtype] if dtype else None,
        force=force,
        on_plan=begin,
        on_tensor=on_tensor,
    )


def missing_merges(base: Path, uses: Sequence[LoRAUse]) -> list[str]:
    """Return a note for each LoRA that the base's header does not name with this strength."""
    left: dict[str, float] = {}
    for part in merged_before(open_weights(base).metadata):
        if isinstance(part, dict) and isinstance(strength := part.get("strength"), int | float):
            left[str(part.get("file"))] = left.get(str(part.get("file")), 0.0) + strength
    return [
        f"{base.name} does not say that {use.path.name} was merged into it with strength "
        f"{use.strength:g}"
        + (f", but with {left[use.path.name]:g}" if left.get(use.path.name) else "")
        for use in uses
        if left.get(use.path.name) != use.strength
    ]
