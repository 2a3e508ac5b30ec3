"""What waits outside the GPU: optimizer state and weights in RAM, or on an SSD.

Measured with DeepSpeed 0.19.8, whose stages 1 and 2 take "nvme" for "cpu" without a word, whose
stage 0 ignores both sections, and which reads `offload_param` at stage 3 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.contract.errors import Problem
from trainer.contract.nvme import (
    SUB_GROUP_ELEMENTS,
    WEIGHT_BUFFERS,
    WEIGHTS_AHEAD,
    WEIGHTS_IN_RAM,
    weight_buffer_elements,
)

Place = Literal["none", "cpu", "nvme"]
OPTIMIZER_KEY = "distributed.offload_optimizer"
PARAMETERS_KEY = "distributed.offload_parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Where the parts of the training state wait that the GPU does not need right now."""

    optimizer: Place = "none"
    """Moments and fp32 masters; the optimizer steps on the CPU then."""
    parameters: Place = "none"
    """Stage 3: weights of layers that do not compute."""
    nvme_path: Path | None = None
    """Folder of what is on `nvme`."""
    pin_memory: bool = False
    """Lock the RAM, so that copies run beside the computation; has a meaning on CUDA only."""
    swapped_elements: int = SUB_GROUP_ELEMENTS
    """Of a rank's state on `nvme` that are in RAM at a time: 4 buffers of 4 bytes for each."""


NO_OFFLOAD = Offload()
SWAPPABLE_ELEMENTS = 262_144
"""A shard of 1 MiB: smaller ones stay in RAM, as no file is read in smaller steps."""


def offload_sections(offload: Offload, largest_weight: int = 0) -> dict[str, Any]:
    """Return what goes into DeepSpeed's section `zero_optimization`; nothing without offload.

    `largest_weight` has so many elements.
    """
    sections: dict[str, Any] = {}
    for name, place in (
        ("offload_optimizer", offload.optimizer),
        ("offload_param", offload.parameters),
    ):
        if place != "none":
            sections[name] = {"device": place, "pin_memory": offload.pin_memory}
        if place == "nvme":
            sections[name]["nvme_path"] = str(offload.nvme_path)
    if offload.optimizer == "nvme":
        sections["sub_group_size"] = offload.swapped_elements
    if offload.parameters == "nvme":
        # Else up to 2 GB of them stay in RAM.
        sections["offload_param"] |= {
            "max_in_cpu": WEIGHTS_IN_RAM,
            "buffer_count": WEIGHT_BUFFERS,
            "buffer_size": weight_buffer_elements(largest_weight),
        }
        sections |= {
            "stage3_max_live_parameters": WEIGHTS_AHEAD,
            "stage3_max_reuse_distance": WEIGHTS_AHEAD,
            "stage3_prefetch_bucket_size": WEIGHTS_AHEAD,
        }
    return sections


def offload_problems(config: dict[str, Any]) -> Iterator[Problem]:
    """Yield what DeepSpeed would do otherwise than its config says."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    optimizer = zero.get("offload_optimizer", {}).get("device", "none")
    parameters = zero.get("offload_param", {}).get("device", "none")
    if optimizer != "none" and stage == 0:
        yield Problem("stage 0 would keep the state on the GPU", key=OPTIMIZER_KEY)
    if optimizer == "nvme" and stage in {1, 2}:
        yield Problem("stages 1 and 2 would keep the state in RAM", key=OPTIMIZER_KEY)
    if parameters != "none" and stage != 3:
        yield Problem("only stage 3 moves weights", key=PARAMETERS_KEY)
    if optimizer != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        yield Problem(
            "an optimizer of torch cannot be offloaded while this is true",
            key="zero_force_ds_cpu_optimizer",
            hint="set it to false",
        )
