"""Seconds that a step spends on moving bytes: to and from RAM or an SSD, and between GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.contract.memory_model.block import BlockShape
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.offload import (
    offloaded_disk_parts,
    optimizer_place,
    parameters_place,
)
from trainer.contract.memory_model.workload import Workload

COPY_COST = 0.1
"""Share of the time of a copy beside the computation that the computation loses."""
CPU_UPDATE_BYTES = 28
"""Bytes that AdamW reads and writes a parameter: master, gradient, moments; back, less gradient."""
HOST_SHARE = 0.5
"""Share of the named bandwidth of a machine's RAM that an update on the CPU reaches."""
NVME_GB_S = 3.0
"""Bandwidth that is assumed of a local SSD."""
NVME_READ, NVME_WRITTEN = 16, 12
"""The same bytes, from an SSD and back."""
EXCHANGES = 4
"""Of a block's tokens between the ranks that share a clip: q, k, v, and what attention gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of a step's computation, beside which copies run."""

    forward: float
    backward: float


def traffic_parts(work: Workload, gpu: Gpu, pace: Pace) -> dict[str, float]:
    """Return the seconds of one weight update by what is moved; all links work at once.

    Args:
        work: one process's share.
        gpu: with its links.
        pace: of the whole update's microbatches.
    """
    return {
        "copies from and to RAM": _host_copies(work, gpu, pace),
        "offloaded update": _offloaded_update(work, gpu),
        "offloaded weights": _offloaded_weights(work, gpu, pace),
        "gradients between GPUs": _gradients(work, gpu, pace),
        "weights between GPUs": _weights(work, gpu, pace),
        "sequence exchange": _exchange(work, gpu),
        "change of the expert": _change_of_expert(work, gpu),
    }


def _repeats(work: Workload) -> int:
    return work.config.training.gradient_accumulation_steps


def beside(seconds: float, computing: float) -> float:
    """Return the seconds that a transfer costs which runs beside a computation."""
    return max(0.0, seconds - computing) + COPY_COST * seconds


def _host_copies(work: Workload, gpu: Gpu, pace: Pace) -> float:
    """Swapped blocks and parked checkpoints, once in the forward and once in the backward."""
    copied = work.swapped * work.block_bytes
    if work.config.memory.offload_checkpoints:
        copied += work.recomputed * work.block_shape().tokens_bytes
    seconds = _repeats(work) * copied / (gpu.host_gb_s * 1e9)
    return beside(seconds, pace.forward) + beside(seconds, pace.backward)


def _offloaded_update(work: Workload, gpu: Gpu) -> float:
    """Gradients to RAM, the update on the CPU (whose RAM a machine shares), weights back."""
    place = optimizer_place(work)
    if place == "none":
        return 0.0
    trained, repeats = work.trained_parameters, _repeats(work)
    own = trained / work.world_size * work.gradient_element
    # A later microbatch fetches what is there, adds to it and puts it back.
    moved = own * (2 * repeats - 1) + own
    seconds = moved / (gpu.host_gb_s * 1e9)
    updated = trained * work.share_here
    seconds += updated * CPU_UPDATE_BYTES / (gpu.host_memory_gb_s * HOST_SHARE * 1e9)
    if place == "nvme":
        seconds += updated * (NVME_READ + NVME_WRITTEN) / (NVME_GB_S * 1e9)
    return seconds


def _offloaded_weights(work: Workload, gpu: Gpu, pace: Pace) -> float:
    """Each rank fetches its share of all weights, in the forward and in the backward."""
    place = parameters_place(work)
    if place == "none":
        return 0.0
    share = work.weight_bytes / work.world_size
    seconds = _repeats(work) * share / (gpu.host_gb_s * 1e9)
    if place == "nvme":  # layer by layer, when one is needed: nothing is beside anything
        on_disk = offloaded_disk_parts(work)["weights on NVMe"]
        return 2 * (seconds + _repeats(work) * on_disk / (NVME_GB_S * 1e9))
    return beside(seconds, pace.forward) + beside(seconds, pace.backward)


def _gradients(work: Workload, gpu: Gpu, pace: Pace) -> float:
    """Each rank sends and receives the whole but its own part; twice where all need the sum."""
    sent = work.trained_parameters * work.gradient_element * _others(work.world_size)
    seconds = sent / (gpu.link_gb_s * 1e9)
    if work.zero_stage >= 2:
        return beside(_repeats(work) * seconds, pace.backward)
    return 2 * seconds if work.zero_stage == 0 else seconds


def _weights(work: Workload, gpu: Gpu, pace: Pace) -> float:
    """ZeRO-1 and 2 gather what was updated; ZeRO-3 all weights, forward and backward."""
    others, link = _others(work.world_size), gpu.link_gb_s * 1e9
    if work.zero_stage == 0:
        return 0.0
    if work.zero_stage < 3:
        return work.trained_parameters * work.gradient_element * others / link
    seconds = _repeats(work) * work.weight_bytes * others / link
    if parameters_place(work) == "nvme":
        return 2 * seconds
    return beside(seconds, pace.forward) + beside(seconds, pace.backward)


def forward_traffic(work: Workload, gpu: Gpu, computing: float) -> dict[str, float]:
    """Return the seconds of one forward's weights where the processes of a run hold parts of them.

    Args:
        work: one process's share.
        gpu: with its links.
        computing: seconds of the forward, beside which copies run.
    """
    if work.zero_stage != 3:
        return {}
    gathered = work.weight_bytes * _others(work.world_size) / (gpu.link_gb_s * 1e9)
    place = parameters_place(work)
    if place == "none":
        return {"weights between GPUs": beside(gathered, computing)}
    fetched = work.weight_bytes / work.world_size / (gpu.host_gb_s * 1e9)
    if place == "cpu":
        return {
            "weights between GPUs": beside(gathered, computing),
            "offloaded weights": beside(fetched, computing),
        }
    on_disk = offloaded_disk_parts(work)["weights on NVMe"] / (NVME_GB_S * 1e9)
    return {"weights between GPUs": gathered, "offloaded weights": fetched + on_disk}


def _exchange(work: Workload, gpu: Gpu) -> float:
    """All-to-all of a rank's tokens, in the forward, its recomputation and the backward."""
    passes = 2 * work.shape.num_layers + work.recomputed
    once = exchange_seconds(work.block_shape(), work.sequence_ranks, passes, gpu)
    return _repeats(work) * once


def exchange_seconds(shape: BlockShape, ranks: int, passes: int, gpu: Gpu) -> float:
    """Return the seconds of the all-to-alls of so many passes through a block.

    Args:
        shape: of a block, with this rank's tokens.
        ranks: processes that share them.
        passes: how often a block runs.
        gpu: the card.
    """
    sent = EXCHANGES * shape.tokens_bytes * _others(ranks)
    return passes * sent / (gpu.link_gb_s * 1e9)


def _change_of_expert(work: Workload, gpu: Gpu) -> float:
    """An expert's weights from RAM, spread over the steps between two changes.

    The expert with the smaller share has single turns, each between two changes.
    """
    if work.turns is None:
        return 0.0
    smaller = min(work.turns.high_noise_share, 1 - work.turns.high_noise_share)
    changes = 2 * smaller / work.turns.steps_per_turn
    return changes * work.resident_bytes / (gpu.host_gb_s * 1e9)


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks
