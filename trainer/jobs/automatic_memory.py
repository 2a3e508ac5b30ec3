"""What `auto` in `[memory]` becomes on this machine: once, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from trainer.contract.config import DatasetSection, RunConfig
from trainer.contract.errors import ConfigError, MenmaError, RunError
from trainer.contract.memory_model import (
    Automatic,
    Circumstances,
    Clip,
    Gpu,
    gpu_of_memory,
    measured_correction,
    resolve_memory,
)
from trainer.contract.memory_model.denoising import WorkingSet, plan_passes
from trainer.contract.memory_model.gpus import GIB
from trainer.contract.memory_model.phases import COMMUNICATION_BYTES, CONTEXT_BYTES
from trainer.contract.variants import Variant
from trainer.engine.process_group import World
from trainer.jobs.base import Emit
from trainer.jobs.components import with_variant
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import walk_of

_MAX_BYTES = 1200
"""Of one text, so that all of a decision fit the 4 KiB that a rank can tell the others."""


def usable_gpu(device: torch.device, *, world_size: int = 1) -> Gpu | None:
    """Return the GPU with the memory that this process can have now; None for a CPU.

    That is what is free, and what this process holds already: torch's own, the context and, with
    several processes, NCCL's buffers, which the estimate counts.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    if world_size > 1:
        held += COMMUNICATION_BYTES
    name = torch.cuda.get_device_name(device)
    return gpu_of_memory(min(total, free + held) / GIB, name)


def resolve_for_training(
    config: RunConfig, variant: Variant, world: World, emit: Emit
) -> RunConfig:
    """Return the config with values in the place of `auto`, the same on every rank.

    Rank 0 decides for the smallest card of all, and tells the others. Nothing is decided, asked
    or said where nothing is `auto`.

    Args:
        config: what the user wrote.
        variant: what `model.variant` was found to be.
        world: this process's place. Calls are collective.
        emit: told of the decision.

    Raises:
        RunError: it fits with no value, on every rank.
        ConfigError: the model or the dataset cannot be read, on every rank.
    """
    if not config.memory.automatic:
        return config
    card = usable_gpu(world.device, world_size=world.world_size)
    own = "" if card is None else json.dumps([card.memory_gib, card.name])
    cards = [json.loads(text) for text in world.gather_texts(own) if text]
    decision: dict[str, Any] = {}
    if world.rank == 0:
        smallest = gpu_of_memory(*min(cards)) if cards else None
        decision = _decide(with_variant(config, variant), smallest, world.world_size)
    decision = json.loads(world.text_of_rank_0(json.dumps(decision, ensure_ascii=False)))
    if "error" in decision:
        kind = ConfigError if decision["mistake"] else RunError
        raise kind(decision["error"], hint=decision["hint"])
    emit("log", message=decision["words"], memory=decision["values"])
    if decision["warning"]:
        emit("warning", message=decision["warning"])
    return _with_values(config, decision["values"])


def resolve_for_forwards(
    config: RunConfig,
    variant: Variant,
    device: torch.device,
    forwards: Sequence[WorkingSet],
    emit: Emit,
    *,
    processes: int = 1,
) -> RunConfig:
    """Return the config with values in the place of `auto`, for sampling or measuring alone.

    Args:
        config: what the user wrote.
        variant: what `model.variant` was found to be.
        device: where it runs.
        forwards: what the transformer will work on.
        emit: told of the decision.
        processes: how many there are.

    Raises:
        RunError: it fits with no value.
    """
    if not config.memory.automatic:
        return config
    # The clips of the dataset may not be here any more, and do not matter.
    bare = with_variant(config, variant).model_copy(update={"dataset": DatasetSection()})
    card, known = usable_gpu(device, world_size=processes), _circumstances(bare, processes)
    resolved = resolve_memory(bare, card, known, forwards=forwards)
    warning = resolved.require_fit()
    emit("log", message=resolved.in_words(), memory=dict(resolved.values))
    if warning:
        emit("warning", message=warning)
    return _with_values(config, resolved.values)


def working_set_of(request: SampleRequest, variant: Variant, *, ranks: int = 1) -> WorkingSet:
    """Return what the transformer works on for a sample, and what is kept of it.

    Args:
        request: the sample.
        variant: the model.
        ranks: processes that share its tokens.
    """
    frames = request.num_walked_frames
    passes = plan_passes(
        request.denoising,
        request.guidance_scale,
        walk_of(request).timesteps.tolist(),
        variant,
        texts_alike=len(set(request.texts)) == 1,
        one_frame=request.one_frame is not None,
    )
    clip = Clip(
        width=request.width,
        height=request.height,
        num_frames=frames,
        batch=passes.largest_batch,
    )
    return WorkingSet(clip=clip, keeps=passes.keeps, ranks=ranks)


def memory_values(config: RunConfig) -> dict[str, bool | int]:
    """Return what a resolved config has of the fields that may be `auto`, for the run's records."""
    memory = config.memory
    every = memory.checkpointed_every
    return {
        "blocks_to_swap": memory.swapped_blocks,
        "gradient_checkpointing": every if every > 1 else bool(every),
    }


def _decide(config: RunConfig, gpu: Gpu | None, world_size: int) -> dict[str, Any]:
    try:
        resolved: Automatic = resolve_memory(config, gpu, _circumstances(config, world_size))
        return {
            "values": dict(resolved.values),
            "words": _cut(resolved.in_words()),
            "warning": _cut(resolved.require_fit()),
        }
    except MenmaError as error:  # all ranks have to end with it
        return {
            "error": _cut(error.message),
            "hint": _cut(error.hint),
            "mistake": isinstance(error, ConfigError),
        }


def _circumstances(config: RunConfig, world_size: int) -> Circumstances:
    correction = measured_correction(config)
    return Circumstances(
        num_gpus=world_size, correction=correction.factor, measured_runs=correction.runs
    )


def _with_values(config: RunConfig, values: Any) -> RunConfig:
    memory = config.memory.model_copy(update=dict(values))
    return config.model_copy(update={"memory": memory})


def _cut(text: str) -> str:
    return text.encode()[:_MAX_BYTES].decode(errors="ignore")
