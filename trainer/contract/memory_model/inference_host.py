"""Host memory of what runs without a backward: caching, sampling, samples of a run.

Weight files are mapped and given back tensor by tensor, so that a model on its way to the GPU is in
RAM with no more than its largest tensor. What is left are frames, and weights that wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.costs import FILE_ELEMENT
from trainer.contract.memory_model.host import PROCESS_BYTES
from trainer.contract.memory_model.techniques import uses_masks
from trainer.contract.memory_model.texts import on_cpu, text_parts
from trainer.contract.memory_model.videos import Video, planned_videos, turns
from trainer.contract.memory_model.weights import block_layers, outer_layers
from trainer.contract.memory_model.workload import ELEMENT, Workload

Parts = dict[str, float]

READER_THREADS = 4
"""Clips that `menma cache` reads at once, ..."""
CLIPS_AHEAD = 4
"""... and those it holds decoded, the one in work included (`jobs.cache.CacheOptions`)."""
READER_BYTES = 48 * 2**20
"""A video being decoded, beside its window: measured with 1080p H.264, on two cores."""
WRITER_BYTES_PER_PIXEL = 280
"""x264's frames in flight, a pixel of one frame: 220 to 280 were measured from 480p to 720p, on two
cores; more cores keep more of them."""


def caching_host(work: Workload, clips: Sequence[Clip]) -> dict[str, Parts]:
    """Return the parts of `menma cache` by phase.

    Args:
        work: the config's.
        clips: the largest of each source.
    """
    window = max(_pixels_bytes(clip) for clip in clips)
    latents: Parts = {
        "processes": PROCESS_BYTES,
        # A window is there twice while its frames are put together.
        "decoded clips": window * (2 * CLIPS_AHEAD - 1) * _decoded_copies(work),
        # In [-1, 1]; beside it the clip with nothing but the frames that are given, of that size.
        "clip as float32": 4 * window * (1 if work.variant.conditioning == "none" else 2),
    }
    if any(clip.num_frames > 1 for clip in clips):
        latents["video readers"] = READER_THREADS * READER_BYTES
    return {"captions": _text_phase(work), "latents": latents}


def _decoded_copies(work: Workload) -> float:
    """Return what is decoded of a clip by its frames (3 bytes a pixel): control frames, masks."""
    copies = 2.0 if work.variant.conditioning == "control" else 1.0
    return copies + (ELEMENT["fp32"] / 3 if uses_masks(work.config) else 0)


def sampling_host(work: Workload, videos: Sequence[Video]) -> dict[str, Parts]:
    """Return the parts of `menma sample` by phase."""
    latents = sum(_latent_bytes(work, video.clip) for video in videos)
    steps: Parts = {"processes": PROCESS_BYTES, "latents": latents}
    phases = {"texts": _text_phase(work)}
    if any(video.images or video.control or video.starts_from_video for video in videos):
        frames = max(
            2 * 4 * _pixels_bytes(video.clip)
            if video.control or video.starts_from_video
            else _frame_bytes(video.clip) * 4
            for video in videos
        )
        phases["inputs"] = {"processes": PROCESS_BYTES, "frames": frames}
        steps["latents"] += sum(
            _latent_bytes(work, video.clip) * work.variant.extra_channels / _channels(work)
            for video in videos
        )
    steps |= _weights(work, num_experts=len(set(turns(videos))) or 1)
    writing: Parts = {"processes": PROCESS_BYTES, "latents": latents}
    writing |= writing_host(work, [video.clip for video in videos])
    return {**phases, "steps": steps, "decoding": writing}


def writing_host(work: Workload, clips: Sequence[Clip]) -> Parts:
    """Return what takes RAM while a video is decoded and written, in one process."""
    largest = max(clips, key=_pixels_bytes)
    frames = _frame_bytes(largest) * min(4, largest.num_frames)  # what the VAE gives at a time
    if work.config.memory.vae_tile is not None:
        frames = _pixels_bytes(largest)
    parts: Parts = {"decoded frames": 2 * frames}  # on arrival, and in the order of pixels
    if largest.num_frames > 1:
        parts["video writer"] = WRITER_BYTES_PER_PIXEL * largest.width * largest.height
    return parts


def samples_host(work: Workload) -> Parts:
    """Return what the samples of a run add to the RAM of training, for all its processes here."""
    sampling = work.config.sampling
    if not sampling.while_training:
        return {}
    element = ELEMENT[work.config.memory.vae_dtype]
    clips = [video.clip for video in planned_videos(sampling, work.variant)]
    parts = {"parked VAE": encoders.vae_bytes(work.variant, element), **writing_host(work, clips)}
    if on_cpu(work):  # gone before the first video is written
        parts = max(parts, text_parts(work), key=lambda one: sum(one.values()))
    return {name: work.processes_here * size for name, size in parts.items()}


def _text_phase(work: Workload) -> Parts:
    table = encoders.UMT5_TABLE_PARAMETERS * FILE_ELEMENT
    parts: Parts = {"processes": PROCESS_BYTES, "weights in transit": table}
    return parts | text_parts(work) if on_cpu(work) else parts


def _weights(work: Workload, *, num_experts: int) -> Parts:
    """Weights in RAM while a transformer is loaded, the last one where there are two."""
    parts: Parts = {}
    if num_experts > 1:
        parts["parked expert"] = (num_experts - 1) * work.resident_bytes
    if not work.swapped:
        parts["weights in transit"] = FILE_ELEMENT * max(
            inputs * outputs
            for layers in (block_layers(work.shape), outer_layers(work.shape))
            for inputs, outputs in layers.values()
        )
        return parts
    # Loaded into RAM as a whole; then one block after the other moves to memory that is pinned.
    parts["swapped blocks"] = num_experts * work.swapped * work.block_bytes
    parts["weights while loading"] = work.resident_bytes + work.block_bytes
    return parts


def _pixels_bytes(clip: Clip) -> int:
    """Bytes of a clip's frames, uint8."""
    return clip.num_frames * _frame_bytes(clip)


def _frame_bytes(clip: Clip) -> int:
    return 3 * clip.width * clip.height


def _channels(work: Workload) -> int:
    return work.variant.latent_channels


def _latent_bytes(work: Workload, clip: Clip) -> int:
    stride = work.variant.vae_stride[1]
    cells = clip.latent_frames(work.variant) * (clip.width // stride) * (clip.height // stride)
    return 4 * _channels(work) * cells
