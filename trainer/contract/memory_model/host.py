"""Host memory and disk."""

from __future__ import annotations

import math

from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.gpus import GIB
from trainer.contract.memory_model.offload import offloaded_disk_parts, offloaded_host_parts
from trainer.contract.memory_model.techniques import uses_masks
from trainer.contract.memory_model.workload import ELEMENT, Workload

PROCESS_BYTES = 2.5 * GIB
"""Interpreter, torch, CUDA's libraries and DeepSpeed in one training process."""


def host_parts(work: Workload) -> dict[str, int]:
    """Return the host memory of all processes of this machine while training."""
    here = work.processes_here
    parts = {"processes": here * PROCESS_BYTES}
    if work.zero_stage == 3:  # every process loads the whole model before it is sharded
        parts["weights while loading"] = here * work.weight_bytes
    experts = 1 if work.turns is None else 2
    if work.turns is not None:  # a pinned copy of each, shared by the processes of a machine
        parts["parked experts"] = experts * work.resident_bytes
    if work.swapped:  # one pinned copy, shared by the processes of a machine
        swapped = work.swapped * work.block_bytes
        parts["swapped blocks"] = experts * swapped
        # Blocks that stay on the GPU pass through RAM, too, since the GPU may not hold them all.
        parts["weights while loading"] = here * (work.weight_bytes - swapped)
    if work.config.memory.offload_checkpoints:
        tokens = work.block_shape().tokens_bytes
        parts["parked activations"] = here * work.recomputed * tokens
    parts |= offloaded_host_parts(work)
    if work.average_bytes and (
        work.config.ema.device == "cpu" or work.config.distributed.offload_optimizer != "none"
    ):
        copies = work.share_here if work.zero_stage else here
        parts["average of weights"] = work.adapters * work.average_bytes * copies
    # A copy of the trained weights on the way to a file.
    beside = work.targets.output - work.trained_parameters  # what a file holds besides
    saved = work.trained_parameters * 4.0 + beside * ELEMENT[work.config.output.dtype]
    parts["saving"] = work.adapters * saved
    sampling = work.config.sampling
    samples = sampling.while_training
    if work.variant.experts and work.turns is None and samples:
        parts["parked expert"] = here * work.weight_bytes
    return {name: round(size) for name, size in parts.items()}


def cache_disk_parts(work: Workload, clip: Clip) -> dict[str, float]:
    """Return the bytes that are cached of one item and of a caption of full length."""
    variant, shape = work.variant, work.shape
    element = ELEMENT[work.config.memory.cache_dtype]
    cells = clip.tokens(variant) * math.prod(shape.patch_size)
    channels = shape.out_channels + (
        shape.in_channels - shape.out_channels if variant.conditioning != "none" else 0
    )
    if uses_masks(work.config):
        channels += 1
    item = channels * cells * element
    if shape.image_dim:
        images = shape.image_tokens * (2 if shape.image_position_embedding else 1)
        item += images * shape.image_dim * element
    return {
        "latents of an item": item,
        "longest caption": shape.text_len * shape.text_dim * element,
    }


def disk_parts(work: Workload) -> dict[str, int]:
    """Return the bytes of files: caches for one item, checkpoints and outputs of the whole run."""
    config = work.config
    trained = work.adapters * work.trained_parameters
    kept = config.checkpoint.keep_last
    training = config.training
    saves = config.checkpoint.times(training.max_steps, training.epochs)
    state = trained * 4.0 + work.adapters * (work.optimizer_state + work.average_bytes)
    on_the_way = config.output.times(training.max_steps - 1, training.epochs)
    if config.output.keep_last is not None:
        on_the_way = min(on_the_way, config.output.keep_last + 1)  # one more while it is written
    outputs = 1 + on_the_way
    files = 2 if config.ema.decay else 1  # one of the average
    return {
        **{name: round(size) for name, size in cache_disk_parts(work, work.clip).items()},
        # One more while the newest is being written.
        "checkpoints": round(state * (min(kept, saves + 1) + 1)),
        "outputs": round(
            files * outputs * work.adapters * work.targets.output * ELEMENT[config.output.dtype]
        ),
        **{name: round(size) for name, size in offloaded_disk_parts(work).items()},
    }
