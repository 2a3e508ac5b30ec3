"""The phases of a run on one GPU, each with the parts of its peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip, cached_clips
from trainer.contract.memory_model.denoising import WorkingSet, kept_parts
from trainer.contract.memory_model.gpus import GIB
from trainer.contract.memory_model.result import PHASES, Phase
from trainer.contract.memory_model.stack import forward_peak
from trainer.contract.memory_model.texts import on_cpu, text_parts
from trainer.contract.memory_model.training import (
    Parts,
    exchange_parts,
    standing_parts,
    step_peak,
)
from trainer.contract.memory_model.videos import planned_videos, sampling_processes
from trainer.contract.memory_model.workload import ELEMENT, Workload

CONTEXT_BYTES = 0.55 * GIB
"""CUDA's context, libraries and workspaces of matrix products."""
COMMUNICATION_BYTES = 0.3 * GIB
"""Buffers of NCCL, with several processes."""
FRAGMENTATION = 0.04
"""Memory that the allocator holds and cannot give out, by what comes and goes in a step."""
SAMPLING_LATENTS = 8
"""Copies of the latents, float32: the solver's history, both velocities, the mixture."""


def phases(
    work: Workload, correction: float = 1.0, names: Sequence[str] = PHASES
) -> tuple[Phase, ...]:
    """Return the phases of these names; `correction` multiplies everything but the context."""
    made: dict[str, Callable[[], Phase]] = {
        "captions": lambda: _phase("captions", _captions(work), correction),
        "latents": lambda: _phase("latents", _latents(work), correction),
        "training": lambda: _phase(
            "training", training_parts(work), correction, ranks=work.world_size
        ),
        "sampling": lambda: _sampling(work, correction),
    }
    return tuple(made[name]() for name in names)


def training_parts(work: Workload) -> Parts:
    """Return the parts of the training peak without context and fragmentation."""
    standing = standing_parts(work)
    step, update = step_peak(work)
    if update > sum(step.values()):
        step = {"gradients": update}
    return {**standing, **step}


def _captions(work: Workload) -> Parts:
    return {} if on_cpu(work) else text_parts(work)


def _latents(work: Workload) -> Parts:
    memory, variant = work.config.memory, work.variant
    element = ELEMENT[memory.vae_dtype]
    clips = cached_clips(work.config, variant)
    parts = {
        "VAE": encoders.vae_bytes(variant, element),
        "encoding": max(
            encoders.vae_work_bytes(variant, clip, "encode", element=element, tile=memory.vae_tile)
            for clip in clips
        ),
    }
    if image := encoders.image_encoder_bytes(variant, element):
        parts["image encoder"] = image
    return parts


def inference_phase(
    work: Workload, forwards: Sequence[WorkingSet], correction: float = 1.0, *, processes: int = 1
) -> Phase:
    """Return the phase of forwards without an optimizer: `menma sample`, or a loss measured.

    Args:
        work: the config's.
        forwards: what the transformer works on.
        correction: multiplies everything but the context.
        processes: how many there are.
    """
    standing = {"weights": work.resident_bytes, "block swap": work.ring_bytes}
    if not work.full:
        standing["adapter"] = work.targets.output * work.element
    if work.companion_bytes:
        standing["frozen adapters"] = work.companion_bytes
    most: Parts = {}
    for one in forwards:
        # `menma sample` lets the transformer go before it decodes.
        parts = [{**standing, **_forwarding(work, one)}, _decoding(work, one.clip)]
        most = max(most, *parts, key=_total)
    return _phase("sampling", most, correction, ranks=processes)


def _sampling(work: Workload, correction: float) -> Phase:
    """Samples during training if the config wants them; else those of `menma sample`."""
    videos = planned_videos(work.config.sampling, work.variant)
    # Processes that share clips make a sample together, too.
    forwards = dict.fromkeys(video.working_set(work.sequence_ranks) for video in videos)
    if not work.config.sampling.while_training:
        processes = sampling_processes(work, len(videos))
        return inference_phase(work, list(forwards), correction, processes=processes)
    standing = {name: size for name, size in standing_parts(work).items() if name != "inputs"}
    if work.variant.experts and work.turns is None:
        other = {"other expert": work.resident_bytes + work.ring_bytes}
    else:
        other = {}
    partitioned = work.zero_stage == 3
    made = [_forwarding(work, one, partitioned=partitioned) | other for one in forwards]
    made += [_decoding(work, one.clip) for one in forwards]
    most = max(({**standing, **parts} for parts in made), key=_total)
    return _phase("sampling", most, correction, ranks=work.world_size)


def _forwarding(work: Workload, working_set: WorkingSet, *, partitioned: bool = False) -> Parts:
    clip, ranks = working_set.clip, working_set.ranks
    variant, shape = work.variant, work.block_shape(clip, ranks=ranks)
    latents = SAMPLING_LATENTS * 4 * variant.latent_channels * clip.latent_frames(variant)
    latents = latents * clip.width * clip.height // variant.vae_stride[1] ** 2
    return {
        "live block": forward_peak(shape),
        "latents": clip.batch * latents,
        **kept_parts(work, working_set, partitioned=partitioned),
        **exchange_parts(shape, ranks),
    }


def _decoding(work: Workload, clip: Clip) -> Parts:
    memory, variant = work.config.memory, work.variant
    element = ELEMENT[memory.vae_dtype]
    return {
        "VAE": encoders.vae_bytes(variant, element),
        "decoding": encoders.vae_work_bytes(
            variant, clip, "decode", element=element, tile=memory.vae_tile
        ),
    }


def _total(parts: Parts) -> float:
    return sum(parts.values())


_LASTING = {
    "weights",
    "block swap",
    "adapter",
    "fp32 masters",
    "optimizer",
    "offload buffers",
    "ZeRO buckets",
    "text encoder",
    "VAE",
    "image encoder",
}
"""Parts that are there from the start in few large pieces, which leave no gaps."""


def _phase(name: str, parts: Mapping[str, float], correction: float, *, ranks: int = 1) -> Phase:
    moving = sum(size for part, size in parts.items() if part not in _LASTING)
    whole = {**parts, "fragmentation": FRAGMENTATION * moving}
    corrected = {part: round(size * correction) for part, size in whole.items() if size}
    context = CONTEXT_BYTES
    if ranks > 1:
        context += COMMUNICATION_BYTES
    return Phase(name=name, parts={**corrected, "CUDA context": round(context)})
