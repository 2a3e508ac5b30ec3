"""Bake LoRAs into a base model's file, or into both experts of Wan 2.2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.lora_keys import Expert
from trainer.contract.lora_use import LoRAUse
from trainer.io.mapped_load import open_weights
from trainer.jobs.base import Emit
from trainer.jobs.lora_files import check_distinct, experts_of, lora_file
from trainer.jobs.lora_output import check_output, write_together
from trainer.jobs.merge_weights import Merge, Rounding, plan_merge


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did."""

    output: Path
    num_tensors: int
    num_changed: int
    num_bytes: int
    rounding: Rounding
    notes: tuple[str, ...] = ()


def merge_loras(
    base: Path,
    loras: Sequence[LoRAUse],
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    on_plan: Callable[[int], None] | None = None,
    on_tensor: Callable[[str], None] | None = None,
) -> MergeReport:
    """Write `base` with the LoRAs added to its weights: W + Σ strength · delta.

    Names, prefix, metadata and (unless `dtype` is given) dtypes of the base are kept, with two
    exceptions: a folder of shards becomes one file, and diffusers' names become original ones.
    Sums are formed in float32 and rounded once. A weight in fp8 is turned into floats, and the sum
    rounded to the same fp8 format again, with a fresh scale where the file has scales; weights
    that no LoRA changes keep their bytes.

    Args:
        base: transformer weights in any known layout.
        loras: what to add.
        output: a .safetensors file.
        dtype: of the written weights; None keeps each tensor's own.
        force: replace `output` if it is there.
        on_plan: called with the number of tensors before the first is written.
        on_tensor: called with the name of each tensor that was written.

    Raises:
        ConfigError: `output` is there already, or is one of the inputs, or a LoRA is given twice.
        ModelFileError: a LoRA is for another model or expert, or a value does not fit `dtype`.
        DiskError: the disk is full, read-only or faulty; `output` is as it was.
    """
    check_output(output, [base, *(lora.path for lora in loras)], force=force)
    check_distinct(loras)
    merge = plan_merge(base, loras, dtype)
    if on_plan is not None:
        on_plan(len(merge.plan))
    merge.write(output, on_tensor)
    return _report(merge, output)


def merge_pair(
    bases: Mapping[Expert, Path],
    loras: Sequence[LoRAUse],
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    emit: Emit,
) -> list[MergeReport]:
    """Merge into both experts of Wan 2.2: OUT_high_noise.safetensors and OUT_low_noise.safetensors.

    A LoRA goes to the expert that is given with it, else that its metadata or name tells, else to
    both. Both files appear, or none.

    Raises:
        ConfigError, ModelFileError, DiskError: as `merge_loras`; also an expert without a LoRA.
    """
    check_distinct(loras)
    inputs = [*bases.values(), *(lora.path for lora in loras)]
    outputs = {expert: _of_expert(output, expert) for expert in EXPERTS}
    for path in outputs.values():
        check_output(path, inputs, force=force)
    if bases["high_noise"].resolve() == bases["low_noise"].resolve():
        raise ConfigError(
            f"{bases['low_noise']} is given for both experts", hint="give the file of each"
        )
    merges: dict[Expert, Merge] = {}
    for expert in EXPERTS:
        _check_base(bases[expert], expert)
        uses = [
            lora.model_copy(update={"expert": expert})
            for lora in loras
            if expert in experts_of(lora, open_weights(lora_file(lora.path)).metadata)
        ]
        if not uses:
            raise ConfigError(
                f"no LoRA is for the {expert} expert",
                hint="merge into the other one alone, or write --lora FILE@" + expert,
            )
        merges[expert] = plan_merge(bases[expert], uses, dtype)
    progress = MergeProgress(emit, output.name)
    progress.begin(sum(len(merge.plan) for merge in merges.values()))

    def writer(merge: Merge) -> Callable[[Path], None]:
        return lambda path: merge.write(path, progress.tensor)

    write_together({outputs[expert]: writer(merge) for expert, merge in merges.items()})
    return [_report(merge, outputs[expert]) for expert, merge in merges.items()]


class MergeProgress:
    """Counts written tensors as a phase."""

    def __init__(self, emit: Emit, detail: str) -> None:
        self._emit, self._detail = emit, detail
        self._done = self._total = 0

    def begin(self, total: int) -> None:
        """Take the number of tensors."""
        self._total = total
        self._emit("phase", name="merge", detail=self._detail)

    def tensor(self, name: str) -> None:
        """Count one."""
        self._done += 1
        self._emit("phase", name="merge", done=self._done, total=self._total, detail=name)


def _report(merge: Merge, output: Path) -> MergeReport:
    return MergeReport(
        output=output,
        num_tensors=len(merge.plan),
        num_changed=merge.num_changed,
        num_bytes=output.stat().st_size,
        rounding=merge.rounding,
        notes=merge.notes,
    )


def _of_expert(output: Path, expert: Expert) -> Path:
    return output.with_name(f"{output.stem}_{expert}{output.suffix}")


def _check_base(base: Path, expert: Expert) -> None:
    told = open_weights(base).metadata.get("menma.expert")
    if told in EXPERTS and told != expert:
        raise ModelFileError(
            f"{base} is the {told} expert, and was given as the {expert} one",
            hint="swap the two bases",
        )
