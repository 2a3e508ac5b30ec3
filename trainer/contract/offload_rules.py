"""What goes with what in `[distributed]` where state or weights wait outside the GPU."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import DistributedSection, RunConfig
from trainer.contract.errors import Problem

OPTIMIZER_KEY = "distributed.offload_optimizer"
PARAMETERS_KEY = "distributed.offload_parameters"
PATH_KEY = "distributed.nvme_path"


def offload_key(distributed: DistributedSection) -> str | None:
    """Return the first key that offloads something; None where nothing is offloaded."""
    if distributed.offload_optimizer != "none":
        return OPTIMIZER_KEY
    return PARAMETERS_KEY if distributed.offload_parameters != "none" else None


def nvme_key(distributed: DistributedSection) -> str | None:
    """Return the first key that says `nvme`; None where none does."""
    if distributed.offload_optimizer == "nvme":
        return OPTIMIZER_KEY
    return PARAMETERS_KEY if distributed.offload_parameters == "nvme" else None


def offload_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield where offload and the rest of the config exclude one another."""
    distributed = config.distributed
    key = offload_key(distributed)
    if key is not None and distributed.engine == "local":
        yield Problem(
            "the local engine offloads nothing",
            key,
            hint='leave it out, or set distributed.engine = "deepspeed" and zero_stage = 2',
        )
    elif key is not None:
        yield from _stage(distributed)
    yield from _path(distributed)
    mixed = config.adapter.kind != "none" and config.memory.weight_format != "fp32"
    if distributed.offload_parameters == "nvme" and mixed:
        yield Problem(
            "DeepSpeed reads all weights from nvme as one dtype, and an adapter is fp32 on a base "
            f"in {config.memory.weight_format}",
            PARAMETERS_KEY,
            hint='set it to "cpu", or train the model\'s own weights: adapter.kind = "none"',
        )


def _stage(distributed: DistributedSection) -> Iterator[Problem]:
    stage = distributed.zero_stage
    if distributed.offload_optimizer != "none" and stage == 0:
        yield Problem(
            "ZeRO moves the optimizer's state, and zero_stage is 0",
            OPTIMIZER_KEY,
            hint="set distributed.zero_stage = 2 (1 and 3 do, too)",
        )
    if distributed.offload_optimizer == "nvme" and stage in {1, 2}:
        yield Problem(
            f"ZeRO-{stage} keeps offloaded state in RAM; only ZeRO-3 puts it on an SSD",
            OPTIMIZER_KEY,
            hint='set it to "cpu", or distributed.zero_stage = 3',
        )
    if distributed.offload_parameters != "none" and stage != 3:
        yield Problem(
            f"only ZeRO-3 moves weights, and zero_stage is {stage}",
            PARAMETERS_KEY,
            hint="set distributed.zero_stage = 3, or leave it out; for a LoRA on one GPU "
            "memory.blocks_to_swap does the like",
        )


def _path(distributed: DistributedSection) -> Iterator[Problem]:
    key = nvme_key(distributed)
    if key is not None and distributed.nvme_path is None:
        yield Problem(
            "needed for what is offloaded to nvme, but not given",
            PATH_KEY,
            hint=f'name a folder on a local SSD, or set {key} = "cpu"',
        )
    if key is None and distributed.nvme_path is not None:
        yield Problem(
            "has a meaning only where something is offloaded to nvme",
            PATH_KEY,
            hint='leave it out, or set distributed.offload_optimizer = "nvme"',
        )
