"""The job `lora_resize`: change the rank of a LoRA, or make a plain LoRA of another kind."""

from __future__ import annotations

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.low_rank import Cut, factorise, truncate
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import LoRAResizeRequest
from trainer.contract.lora_use import LoRAUse
from trainer.jobs.base import Emit
from trainer.jobs.lora_files import is_plain, load_lora
from trainer.jobs.lora_merge import OnModule, Summed, counting, emit_summed, target_of
from trainer.jobs.lora_metadata import lost_notes, tool_metadata
from trainer.jobs.lora_output import Target, check_output, in_dtype, write_lora
from trainer.jobs.lora_sum import Energies, cut_of, delta_of, rank_counts


def run(request: LoRAResizeRequest, emit: Emit) -> None:
    """Job `lora_resize`; its `output` event has the ranks, and the energy left by module."""
    summed = resize_lora(
        LoRAUse(path=request.input, expert=request.expert),
        target_of(request),
        cut_of(request),
        on_module=counting(emit, "resize"),
    )
    emit_summed(summed, emit)


def resize_lora(
    use: LoRAUse, target: Target, cut: Cut, *, on_module: OnModule | None = None
) -> Summed:
    """Write the closest LoRA, in the Frobenius norm, that the cut allows.

    The scale (alpha / rank) of a plain LoRA stays, so alpha changes with the rank. A module whose
    rank is within a fixed rank already is kept as it is. Other kinds become a plain LoRA of
    scale 1.

    Raises:
        ConfigError: nothing limits the rank, the output is there already or is the input.
        ModelFileError: the file cannot be read, or the updates depend on the base's weights.
        DiskError: the disk is full, read-only or faulty; the output is as it was.
    """
    check_output(target.path, [use.path], force=target.force)
    if not cut.limits:
        raise ConfigError(
            "nothing says how far to resize",
            hint="give --rank R, --energy E, --frobenius F or --ratio Q",
        )
    adapter = load_lora(use, differences=True)
    updates: dict[str, Update] = {}
    energies = Energies()
    kept = 0
    fixed = cut.energy is None and cut.ratio is None
    for number, (name, update) in enumerate(adapter.items(), start=1):
        if is_plain(update) and fixed and update.rank <= (cut.max_rank or 0):
            updates[name] = update
            kept += 1
        else:
            result = (
                truncate(update, cut)
                if isinstance(update, LoRAFactors) and is_plain(update)
                else factorise(delta_of(adapter.path, name, update), cut)
            )
            energies.add(name, result)
            updates[name] = result.factors
        if on_module is not None:
            on_module(number, len(adapter), name)
    facts = {"rank": cut.max_rank, "energy": cut.energy, "ratio": cut.ratio}
    given = {key: value for key, value in facts.items() if value is not None}
    metadata = tool_metadata(adapter, "resize", **given, energy_kept=round(energies.overall, 6))
    if not all(map(is_plain, adapter.values())):
        metadata.pop("ss_network_module", None)  # named the kind that it was
    written = write_lora(
        updates,
        target,
        [adapter],
        metadata,
        exact=not energies.kept,
        differences=in_dtype(adapter.path, adapter.differences, target.dtype),
    )
    notes = [*adapter.notes, *lost_notes([adapter]), *written.notes]
    if adapter.differences:
        notes.append(f"{len(adapter.differences)} whole differences of parameters are kept")
    if kept:
        notes.append(f"{kept} of {len(adapter)} modules have rank {cut.max_rank} or less already")
    return Summed(written, rank_counts(updates), energies, tuple(notes))
