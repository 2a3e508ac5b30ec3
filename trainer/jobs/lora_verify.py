"""The job `lora_verify`: prove that LoRA files do not write to the same matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.adapters.apply import describe
from trainer.contract.errors import ConfigError
from trainer.contract.jobs import LoraVerifyRequest
from trainer.contract.loraid import in_words, numbers_text
from trainer.contract.loraid_metadata import Loraid
from trainer.jobs.base import MAX_LISTED, Emit
from trainer.jobs.loraid_files import (
    SlotFile,
    find_disagreements,
    find_overlaps,
    read_slot_files,
)


def run(request: LoraVerifyRequest, emit: Emit) -> None:
    """Compare the files by the names of their layers.

    An `output` event a file (`file`) and a pair that meets (`overlap`); the `end` event says
    whether they are disjoint, which slots are free and what the files disagree on.

    Raises:
        ConfigError: a file is given twice.
        ModelFileError: a file cannot be read as a LoRA; names the file and the key.
    """
    seen = set()
    for path in request.paths:
        if path.resolve() in seen:
            raise ConfigError(f"{path} is given twice", hint="name each file once")
        seen.add(path.resolve())
    files = [
        file for path in request.paths for file in read_slot_files(path, expert=request.expert)
    ]
    for file in files:
        emit("output", file=_file_fields(file))
    disjoint = True
    for overlap in find_overlaps(files):
        disjoint = disjoint and overlap.shared
        emit(
            "output",
            overlap={
                "files": [str(overlap.first), str(overlap.second)],
                "num_modules": len(overlap.modules),
                "modules": list(overlap.modules[:MAX_LISTED]),
                "where": in_words(overlap.modules),
                "shared": overlap.shared,
            },
        )
    emit(
        "end",
        reason="done",
        disjoint=disjoint,
        free=free_slots(files),
        disagreements=find_disagreements(files),
    )


def free_slots(files: Sequence[SlotFile]) -> dict[str, list[int]] | None:
    """Return expert -> slots whose layers none of the files changes.

    None: no file says how many slots there are, or they disagree.
    """
    told = [file.loraid for file in files if file.loraid is not None]
    if not told or len({loraid.scheme for loraid in told}) > 1:
        return None
    image = told[0].granularity != "linear" or any(
        name.endswith("_img") for file in files for name in file.shapes
    )
    try:
        partition = told[0].partition(image=image)
    except ConfigError:
        return None
    if partition is None:
        return None
    experts = sorted({file.expert for file in files if file.loraid is not None})
    if len(experts) > 1 and "none" in experts:
        experts.remove("none")
    free: dict[str, list[int]] = {}
    for expert in experts:
        taken = {
            partition.slot_of(name)
            for file in files
            if file.expert in {expert, "none"}
            for name in file.shapes
        }
        free[expert] = [slot for slot in range(1, partition.slots + 1) if slot not in taken]
    return free


def _file_fields(file: SlotFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "model": describe(file.shapes),
        "variant": file.variant,
        "num_modules": len(file.shapes),
        **_slot_fields(file.loraid),
        "expert": None if file.loraid is None and file.expert == "none" else file.expert,
        "outside": in_words(file.outside) or ", ".join(file.outside[:8]),
        "num_outside": len(file.outside),
        "notes": list(file.notes),
    }


def _slot_fields(loraid: Loraid | None) -> dict[str, Any]:
    if loraid is None:
        keys = ("ids", "slots", "granularity", "allocation", "num_blocks", "units")
        return {**dict.fromkeys(keys), "shared": ""}
    return {
        "ids": list(loraid.ids),
        "slots": loraid.slots,
        "granularity": loraid.granularity,
        "allocation": loraid.allocation,
        "num_blocks": loraid.num_blocks,
        "units": numbers_text(loraid.units),
        "shared": loraid.shared,
    }
