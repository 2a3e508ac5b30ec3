"""What ZeRO-Offload and ZeRO-Infinity leave on the GPU, and what they put into RAM and on an SSD.

Read from DeepSpeed 0.19.8 (`stage_1_and_2.py`, `stage3.py`, `swap_tensor/`), with its defaults for
what Menma does not set. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

from trainer.contract.memory_model.weights import (
    block_layers,
    block_linear_parameters,
    outer_layers,
)
from trainer.contract.memory_model.workload import Workload
from trainer.contract.nvme import (
    SUB_GROUP_ELEMENTS,
    WEIGHT_BUFFERS,
    WEIGHTS_AHEAD,
    WEIGHTS_IN_RAM,
    weight_buffer_elements,
)

Parts = dict[str, float]

FLOAT32 = 4
OPTIMIZER_BUFFERS = 4
"""Pinned float32 buffers of one such group on the way from and to an SSD: `buffer_count`."""
GATHERED_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered: DeepSpeed's `stage3_max_live_parameters`."""


def optimizer_place(work: Workload) -> str:
    """Return where the optimizer's state is: none (on the GPU), cpu or nvme."""
    place = work.config.distributed.offload_optimizer
    if work.zero_stage == 0:
        return "none"
    return "cpu" if place == "nvme" and work.zero_stage < 3 else place


def parameters_place(work: Workload) -> str:
    """Return where weights wait: none (on the GPU), cpu or nvme."""
    return work.config.distributed.offload_parameters if work.zero_stage == 3 else "none"


def weights_on_gpu(work: Workload) -> float:
    """Return the bytes of weights that stay on each GPU."""
    if work.zero_stage < 3:
        return work.resident_bytes
    # Biases, norms, modulations and scales are smaller than what ZeRO-3 takes apart.
    matrices = block_linear_parameters(work.shape) * (1 if work.fp8 else work.element)
    whole = work.shape.num_layers * (work.block_bytes - matrices)
    if parameters_place(work) != "none":
        return whole
    return whole + (work.resident_bytes - whole) / work.world_size


def gathered_bytes(work: Workload) -> float:
    """Return the weights that ZeRO-3 holds gathered at most: at least the layer that computes."""
    if parameters_place(work) == "nvme":
        return max(WEIGHTS_AHEAD, _largest_layer(work)) * work.element
    blocks = work.shape.num_layers * work.block_bytes
    return min(GATHERED_ELEMENTS * (1 if work.fp8 else work.element), blocks)


def gpu_buffers(work: Workload) -> float:
    """Return what stages 1 and 2 hold on the GPU to add gradients up that wait in RAM."""
    if optimizer_place(work) == "none" or work.zero_stage == 3:
        return 0.0
    return work.targets.largest * work.gradient_element


def offloaded_host_parts(work: Workload) -> Parts:
    """Return what waits in the RAM of this machine, for all its processes."""
    parts: Parts = {}
    trained, world = work.trained_parameters, work.world_size
    here = work.processes_here
    trained_here = trained * work.share_here
    repeated = work.config.training.gradient_accumulation_steps > 1
    place = optimizer_place(work)
    if place == "cpu":
        # Masters and float32 gradients, both pinned, and the optimizer's own state.
        state = trained_here * 2 * FLOAT32 + work.optimizer_state * work.share_here
        parts["offloaded optimizer"] = work.adapters * state
    elif place == "nvme":
        group = min(SUB_GROUP_ELEMENTS, trained / world)
        parts["offload buffers"] = here * (OPTIMIZER_BUFFERS + 1) * FLOAT32 * group
    if place != "none":
        if work.zero_stage == 3:  # what gradients are added up in
            copies = trained_here * (FLOAT32 if repeated else work.gradient_element)
        else:  # weights on the way back to the GPU, and gradients of the microbatches before
            copies = trained_here * work.gradient_element * (2 if repeated else 1)
            copies += here * work.targets.largest * work.gradient_element
        parts["gradients and weights in transit"] = work.adapters * copies
    place = parameters_place(work)
    if place == "cpu":
        parts["offloaded weights"] = work.weight_bytes * work.share_here
    elif place == "nvme":
        kept = min(WEIGHTS_IN_RAM, trained / world) if work.full else 0.0
        buffers = WEIGHT_BUFFERS * weight_buffer_elements(int(_largest_layer(work)))
        parts["offloaded weights"] = here * (buffers + kept) * work.element
    return parts


def offloaded_disk_parts(work: Workload) -> Parts:
    """Return what is on this machine's SSD, `distributed.nvme_path`, while a run trains."""
    parts: Parts = {}
    if optimizer_place(work) == "nvme":  # masters, gradients, moments
        state = work.trained_parameters * 2 * FLOAT32 + work.optimizer_state
        parts["optimizer on NVMe"] = work.share_here * state
    if parameters_place(work) == "nvme":
        parts["weights on NVMe"] = work.weight_bytes * work.share_here
    return parts


def _largest_layer(work: Workload) -> float:
    """Return the elements of the model's largest layer."""
    layers = (*block_layers(work.shape).values(), *outer_layers(work.shape).values())
    return max(i * o for i, o in layers)
