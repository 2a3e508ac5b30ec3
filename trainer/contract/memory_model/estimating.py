"""The estimate of a config, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.caching import caching_cost
from trainer.contract.memory_model.costs import whole_bytes
from trainer.contract.memory_model.denoising import WorkingSet
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.host import disk_parts, host_parts
from trainer.contract.memory_model.inference_host import samples_host
from trainer.contract.memory_model.phases import inference_phase, phases
from trainer.contract.memory_model.result import PHASES, Estimate
from trainer.contract.memory_model.sampling import samples_cost, sampling_cost
from trainer.contract.memory_model.techniques import technique_parts
from trainer.contract.memory_model.timing import step_parts
from trainer.contract.memory_model.workload import Workload, workload_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What an estimate takes into account beside config and card."""

    num_gpus: int = 1
    """Processes where `distributed.num_processes` is left open."""
    correction: float = 1.0
    """Measured / estimated peaks of earlier runs; 1: none."""
    measured_runs: int = 0
    """How many runs the correction comes from; they narrow the margin."""
    machine_bytes: int | None = None
    """RAM of the machine; None: not known."""


def estimate_resolved(
    config: RunConfig, card: Gpu | None, known: Circumstances | None = None
) -> Estimate:
    """Return what a config without `auto` in `[memory]` takes on each GPU; see `estimate`.

    Args:
        config: checked, and resolved.
        card: None: no verdict and no step time.
        known: number of GPUs, and what was measured; left out: one GPU, nothing.
    """
    known = known or Circumstances()
    return estimate_workload(workload_of(config, num_gpus=known.num_gpus), card, known)


def estimate_workload(
    work: Workload, card: Gpu | None, known: Circumstances, names: Sequence[str] = PHASES
) -> Estimate:
    """Return what a process's share of a run takes, in the phases of these names."""
    seconds = {} if card is None else step_parts(work, card) | technique_parts(work, card)
    return Estimate(
        variant=work.variant.name,
        clip=work.clip,
        tokens=work.tokens,
        num_blocks=work.shape.num_layers,
        world_size=work.world_size,
        gpu=card,
        phases=phases(work, known.correction, names),
        host_parts=host_parts(work) | whole_bytes(samples_host(work)),
        disk_parts=disk_parts(work),
        step_seconds=sum(seconds.values()) if seconds else None,
        step_parts=seconds,
        correction=known.correction,
        measured_runs=known.measured_runs,
        machine_bytes=known.machine_bytes,
        turns=work.known_turns,
    )


def with_jobs(result: Estimate, config: RunConfig, known: Circumstances | None = None) -> Estimate:
    """Return an estimate with what caching and sampling take.

    Args:
        result: of `config`.
        config: checked, and resolved.
        known: as in `estimate_resolved`.
    """
    known = known or Circumstances()
    work = workload_of(config, num_gpus=known.num_gpus)
    jobs = {
        "caching": caching_cost(work, result.gpu),
        "sampling": sampling_cost(work, result.gpu),
    }
    samples = samples_cost(work, result.gpu)
    if samples is not None:
        jobs["samples"] = samples
    return replace(result, jobs=jobs)


def estimate_inference(
    work: Workload, forwards: Sequence[WorkingSet], card: Gpu, known: Circumstances | None = None
) -> Estimate:
    """Return what forwards alone take: sampling, or measuring a loss. One phase, `sampling`.

    Args:
        work: of the config.
        forwards: what the transformer works on.
        card: the GPU.
        known: as in `estimate`; `num_gpus` is how many processes there are.
    """
    known = known or Circumstances()
    phase = inference_phase(work, forwards, known.correction, processes=known.num_gpus)
    return Estimate(
        variant=work.variant.name,
        clip=work.clip,
        tokens=work.tokens,
        num_blocks=work.shape.num_layers,
        world_size=known.num_gpus,
        gpu=card,
        phases=(phase,),
        host_parts={},
        disk_parts={},
        step_seconds=None,
        correction=known.correction,
        measured_runs=known.measured_runs,
    )
