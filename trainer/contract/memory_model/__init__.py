"""How much memory, disk and time a config takes, before anything is started. No torch.

`estimate` is the public seam. The peak of a training step comes from a model of the step itself
(`block`, `stack`): what each operator takes, keeps and gives back. `docs/estimate.md` explains the
parts, the margin and how exact it is.
"""

from __future__ import annotations

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.gpus import GPUS, Gpu, find_gpu, gpu_of_memory
from trainer.contract.memory_model.host import disk_parts, host_parts
from trainer.contract.memory_model.phases import phases
from trainer.contract.memory_model.result import Estimate, Phase, Verdict
from trainer.contract.memory_model.timing import step_parts
from trainer.contract.memory_model.workload import workload_of

__all__ = [
    "GPUS",
    "Estimate",
    "Gpu",
    "Phase",
    "Verdict",
    "estimate",
    "find_gpu",
    "gpu_of_memory",
]


def estimate(
    config: RunConfig,
    gpu: Gpu | str | None = None,
    *,
    num_gpus: int = 1,
    correction: float = 1.0,
    measured_runs: int = 0,
) -> Estimate:
    """Return what `config` takes on each GPU.

    Args:
        config: checked, with `model.variant` named.
        gpu: the card, or its name; None: no verdict and no step time.
        num_gpus: processes where `distributed.num_processes` is left open.
        correction: measured / estimated peaks of earlier runs; 1: none.
        measured_runs: how many runs the correction comes from; they narrow the margin.

    Raises:
        ConfigError: the variant is not named, or the dataset cannot be read.
        UserError: there is no GPU of that name.
    """
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    work = workload_of(config, num_gpus=num_gpus)
    seconds = {} if card is None else step_parts(work, card)
    return Estimate(
        variant=work.variant.name,
        clip=work.clip,
        tokens=work.tokens,
        world_size=work.world_size,
        gpu=card,
        phases=phases(work, correction),
        host_parts=host_parts(work),
        disk_parts=disk_parts(work),
        step_seconds=sum(seconds.values()) if seconds else None,
        step_parts=seconds,
        correction=correction,
        measured_runs=measured_runs,
    )
