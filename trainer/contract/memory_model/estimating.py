"""The estimate of a config, put together."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.gpus import Gpu, find_gpu
from trainer.contract.memory_model.host import disk_parts, host_parts
from trainer.contract.memory_model.phases import phases
from trainer.contract.memory_model.result import Estimate
from trainer.contract.memory_model.timing import step_parts
from trainer.contract.memory_model.workload import workload_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What an estimate takes into account beside config and card."""

    num_gpus: int = 1
    """Processes where `distributed.num_processes` is left open."""
    correction: float = 1.0
    """Measured / estimated peaks of earlier runs; 1: none."""
    measured_runs: int = 0
    """How many runs the correction comes from; they narrow the margin."""


def estimate(
    config: RunConfig,
    gpu: Gpu | str | None = None,
    known: Circumstances | None = None,
) -> Estimate:
    """Return what `config` takes on each GPU.

    Args:
        config: checked; where `model.variant` is `auto`, the weight file's header tells.
        gpu: the card, or its name; None: no verdict and no step time.
        known: number of GPUs, and what was measured; left out: one GPU, nothing.

    Raises:
        ConfigError: the variant cannot be told, or the dataset cannot be read.
        UserError: there is no GPU of that name.
    """
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    known = known or Circumstances()
    work = workload_of(config, num_gpus=known.num_gpus)
    seconds = {} if card is None else step_parts(work, card)
    return Estimate(
        variant=work.variant.name,
        clip=work.clip,
        tokens=work.tokens,
        world_size=work.world_size,
        gpu=card,
        phases=phases(work, known.correction),
        host_parts=host_parts(work),
        disk_parts=disk_parts(work),
        step_seconds=sum(seconds.values()) if seconds else None,
        step_parts=seconds,
        correction=known.correction,
        measured_runs=known.measured_runs,
    )
