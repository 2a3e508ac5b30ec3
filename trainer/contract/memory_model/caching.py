"""What `menma cache` takes."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.contract.config import RunConfig
from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip, cached_clips
from trainer.contract.memory_model.costs import (
    JobCost,
    file_bytes,
    loading_seconds,
    whole_bytes,
)
from trainer.contract.memory_model.forwards import (
    convolution_seconds,
    image_seconds,
)
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.host import cache_disk_parts
from trainer.contract.memory_model.inference_host import caching_host
from trainer.contract.memory_model.texts import caption_seconds
from trainer.contract.memory_model.timing import peak_rate
from trainer.contract.memory_model.vae_flops import vae_flops
from trainer.contract.memory_model.workload import ELEMENT, Workload, workload_of


def caching_cost(work: Workload, gpu: Gpu | None) -> JobCost:
    """Return what caching takes: its largest clip, and a caption of full length.

    How many clips there are only the folders tell; see `caching_seconds`.
    """
    clips = cached_clips(work.config, work.variant)
    largest = max(clips, key=lambda clip: clip.num_frames * clip.width * clip.height)
    once, each = {}, {}
    if gpu is not None and peak_rate(gpu, 2):
        once = {"loading": _loading_seconds(work, gpu)}
        each = {**window_parts(work, gpu, largest), "caption": caption_seconds(work, gpu)}
    return JobCost(
        clip=largest,
        host_phases={
            phase: whole_bytes(parts) for phase, parts in caching_host(work, clips).items()
        },
        disk_parts=whole_bytes(cache_disk_parts(work, largest)),
        once_s=once,
        item_s=each,
    )


def caching_seconds(
    config: RunConfig, gpu: Gpu, windows: Mapping[Clip, int], num_captions: int
) -> float | None:
    """Return the seconds of caching so many windows and captions of full length.

    Reading and scaling the clips is not in it; it runs beside.

    Args:
        config: checked.
        gpu: the card.
        windows: size -> how many of it.
        num_captions: captions.

    Returns:
        None where the card's arithmetic is not known.

    Raises:
        ConfigError: the variant cannot be told, or the dataset cannot be read.
    """
    if not peak_rate(gpu, 2):
        return None
    work = workload_of(config)
    encoding = sum(
        count * sum(window_parts(work, gpu, clip).values()) for clip, count in windows.items()
    )
    return _loading_seconds(work, gpu) + encoding + num_captions * caption_seconds(work, gpu)


def window_parts(work: Workload, gpu: Gpu, clip: Clip) -> dict[str, float]:
    """Return the seconds of encoding one window by what takes them."""
    variant, memory = work.variant, work.config.memory
    element = ELEMENT[memory.vae_dtype]
    whole = vae_flops(variant, clip, "encode", memory.vae_tile)
    parts = {"VAE encoding": convolution_seconds(whole, gpu, element)}
    if variant.conditioning != "none":  # the clip with nothing but the frames that are given
        parts["VAE conditioning"] = parts["VAE encoding"]
    if work.shape.image_dim:
        images = 2 if variant.conditioning == "first_last_frame" else 1
        parts["image encoder"] = images * image_seconds(gpu, element)
    return parts


def _loading_seconds(work: Workload, gpu: Gpu) -> float:
    model = work.config.model
    size = file_bytes(model.text_encoder, encoders.UMT5_PARAMETERS)
    size += file_bytes(model.vae, encoders.VAE_PARAMETERS[work.variant.vae])
    if work.shape.image_dim:
        size += file_bytes(model.image_encoder, encoders.CLIP_PARAMETERS)
    return loading_seconds(size, gpu)
