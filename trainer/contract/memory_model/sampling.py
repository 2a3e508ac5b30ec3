"""What `menma sample` takes, and the samples of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.costs import (
    JobCost,
    file_bytes,
    loading_seconds,
    moving_seconds,
    transformer_file_bytes,
    whole_bytes,
)
from trainer.contract.memory_model.forwards import (
    convolution_seconds,
    forward_seconds,
    image_seconds,
)
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.inference_host import sampling_host
from trainer.contract.memory_model.texts import caption_seconds
from trainer.contract.memory_model.timing import peak_rate
from trainer.contract.memory_model.traffic import forward_traffic
from trainer.contract.memory_model.vae_flops import vae_flops
from trainer.contract.memory_model.videos import (
    Video,
    planned_videos,
    sampling_processes,
    turns,
)
from trainer.contract.memory_model.workload import ELEMENT, Workload

VIDEO_BYTES_PER_PIXEL = 0.125
"""Of a written video: one bit a pixel, what x264 takes at most at the quality that is written."""


def sampling_cost(work: Workload, gpu: Gpu | None) -> JobCost:
    """Return what `menma sample` takes for the config's prompts."""
    videos = planned_videos(work.config.sampling, work.variant)
    largest = _largest(work, videos)
    shared, processes = work.sequence_ranks, sampling_processes(work, len(videos))
    mine = videos[:: max(processes // shared, 1)]  # rank 0 has no fewer than the others
    once: dict[str, float] = {}
    item: dict[str, float] = {}
    total = None
    if gpu is not None and peak_rate(gpu, 2):
        once = _once(work, gpu, mine)
        item = video_parts(work, gpu, largest, ranks=shared)
        total = sum(once.values()) + sum(
            sum(video_parts(work, gpu, video, ranks=shared).values()) for video in mine
        )
    return JobCost(
        clip=largest.clip,
        host_phases={
            phase: whole_bytes({name: processes * size for name, size in parts.items()})
            for phase, parts in sampling_host(work, mine).items()
        },
        disk_parts=_disk(largest.clip),
        once_s=once,
        item_s=item,
        items=len(videos),
        total_s=total,
        num_forwards=largest.num_forwards,
        at_most=any(video.step_cache for video in videos),
    )


def samples_cost(work: Workload, gpu: Gpu | None) -> JobCost | None:
    """Return what the samples of a run take each time; None: it makes none.

    Their RAM is a part of training's.
    """
    sampling = work.config.sampling
    if not sampling.while_training:
        return None
    videos = planned_videos(sampling, work.variant)
    largest = _largest(work, videos)
    training = work.config.training
    rounds = int(sampling.at_start) + sampling.times(training.max_steps, training.epochs)
    shared = work.sequence_ranks
    # With ZeRO-3 all ranks make each sample together, else prompts are dealt out.
    dealt = 1 if work.zero_stage == 3 else work.world_size // shared
    item: dict[str, float] = {}
    total = None
    if gpu is not None and peak_rate(gpu, 2):
        item = video_parts(work, gpu, largest, ranks=shared, trains=True)
        mine = videos[::dealt]  # rank 0 has no fewer than the others
        total = _waking_seconds(work, gpu, videos) + sum(
            sum(video_parts(work, gpu, video, ranks=shared, trains=True).values()) for video in mine
        )
    return JobCost(
        clip=largest.clip,
        disk_parts=_disk(largest.clip),
        item_s=item,
        items=len(videos),
        total_s=total,
        num_forwards=largest.num_forwards,
        rounds=rounds,
        at_most=any(video.step_cache for video in videos),
    )


def video_parts(
    work: Workload, gpu: Gpu, video: Video, *, ranks: int = 1, trains: bool = False
) -> dict[str, float]:
    """Return the seconds of one video by what takes them, encoded files and texts left out.

    Args:
        work: the config's.
        gpu: the card.
        video: what is made.
        ranks: processes that share its tokens.
        trains: by the processes of a run, which may hold weights in parts.
    """
    variant, memory = work.variant, work.config.memory
    blocks = video.num_forwards * work.shape.num_layers
    share = 1 - video.passes.blocks_left_out / blocks if blocks else 1.0
    parts: dict[str, float] = defaultdict(float)
    for size, count in video.passes.batches:
        forward = forward_seconds(work, gpu, replace(video.clip, batch=size), ranks=ranks)
        if trains:
            forward |= forward_traffic(work, gpu, sum(forward.values()))
        for name, seconds in forward.items():
            parts[name] += count * seconds * share
    decoded = vae_flops(variant, video.clip, "decode", memory.vae_tile)
    parts["VAE decoding"] = convolution_seconds(decoded, gpu, ELEMENT[memory.vae_dtype])
    return {name: seconds for name, seconds in parts.items() if seconds}


def _once(work: Workload, gpu: Gpu, videos: Sequence[Video]) -> dict[str, float]:
    """Loading, encoding of texts and files, and experts that change places."""
    model, memory, variant = work.config.model, work.config.memory, work.variant
    order = turns(videos)
    size = file_bytes(model.text_encoder, encoders.UMT5_PARAMETERS)
    size += file_bytes(model.vae, encoders.VAE_PARAMETERS[variant.vae])
    size += transformer_file_bytes(work) * len(set(order))
    element = ELEMENT[memory.vae_dtype]
    conditioning = sum(_condition_flops(work, video) for video in videos)
    inputs = convolution_seconds(conditioning, gpu, element)
    if work.shape.image_dim:
        size += file_bytes(model.image_encoder, encoders.CLIP_PARAMETERS)
        inputs += sum(max(video.images, 1) for video in videos) * image_seconds(gpu, element)
    texts = {text for video in videos for text in video.texts}
    # With each turn one expert goes to RAM; the other comes back unless it is loaded then.
    moves = len(order) - 1 + len(order) - len(set(order))
    parts = {
        "loading": loading_seconds(size, gpu),
        "texts": len(texts) * caption_seconds(work, gpu),
        "inputs": inputs,
        "experts to and from RAM": moves * moving_seconds(work.resident_bytes, gpu),
    }
    return {name: seconds for name, seconds in parts.items() if seconds}


def _condition_flops(work: Workload, video: Video) -> float:
    """Return the operations of the VAE for the files that a video starts from."""
    variant, clip = work.variant, video.clip
    still = Clip(width=clip.width, height=clip.height, num_frames=1)
    flops = 0.0
    if video.control or variant.conditioning in {"first_frame", "first_last_frame"}:
        flops = vae_flops(variant, clip, "encode")
    if video.starts_from_video:
        flops += vae_flops(variant, clip, "encode")
    if video.images and (video.control or variant.per_token_timestep):
        flops += vae_flops(variant, still, "encode")
    return flops


def _waking_seconds(work: Workload, gpu: Gpu, videos: Sequence[Video]) -> float:
    """VAE and the expert that is not trained, from RAM and back, each time samples are made."""
    element = ELEMENT[work.config.memory.vae_dtype]
    size = encoders.vae_bytes(work.variant, element)
    if set(turns(videos)) - {work.config.model.expert} and work.variant.experts:
        size += work.resident_bytes
    return 2 * moving_seconds(size, gpu)


def _largest(work: Workload, videos: Sequence[Video]) -> Video:
    return max(videos, key=lambda video: video.num_forwards * video.clip.tokens(work.variant))


def _disk(clip: Clip) -> dict[str, int]:
    pixels = clip.width * clip.height * clip.num_frames
    return {"video": round(VIDEO_BYTES_PER_PIXEL * pixels)} if clip.num_frames > 1 else {}
