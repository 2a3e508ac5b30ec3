"""Steps of a config as `menma train` runs them, on random weights and batches, with a clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.techniques import uses_masks
from trainer.contract.memory_model.workload import Workload
from trainer.core.rng import derive_seed, generator
from trainer.core.seams import BuildContext, Engine
from trainer.core.types import Batch
from trainer.engine.process_group import World
from trainer.jobs.base import Emit
from trainer.jobs.build import HeldElsewhere, fp8_spec, weights_dtype
from trainer.jobs.train_parts import TrainedModel, build_engine, build_model, learning_rate
from trainer.models.wan.random_weights import random_transformer
from trainer.models.wan.transformer import WanTransformer
from trainer.training.reporter import GIB, peaks_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found, over all ranks; memory in GiB."""

    warmup_s: tuple[float, ...]
    """Each step before those that count; the first one compiles and fills caches."""
    steps_s: tuple[float, ...]
    """Each step, the slowest rank's."""
    loss: float
    """Of the last step."""
    peak_reserved_gib: float | None
    """The highest of a GPU, held by torch's allocator; None on a CPU."""
    peak_allocated_gib: float | None
    """The same, in tensors."""
    peak_host_gib: float
    """Resident memory of the process that takes most."""


def measure_steps(
    config: RunConfig, work: Workload, world: World, emit: Emit, *, steps: int, warmup_steps: int
) -> Measured:
    """Build what the job `train` builds and run steps.

    Everything is the job's but weights and batches; `model.variant` must be named. The peaks are
    those of building and running together, as in a run. A collective call.

    Args:
        config: checked.
        work: its numbers.
        world: this process's place.
        emit: takes phases.
        steps: that are timed.
        warmup_steps: before them.

    Raises:
        ConfigError: parts do not fit one another.
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    forget_peaks(world.device)
    build = BuildContext(
        variant=work.variant,
        seed=config.training.seed,
        device=world.device,
        total_steps=warmup_steps + steps,
        encoded=partial(_random_text, work),
    )
    emit("phase", name="load", detail="random weights")
    weights = partial(random_weights, config, work)
    model = build_model(config, build, world, work.clip.batch, weights)
    times: list[float] = []
    loss = math.nan
    with closing(build_engine(config, model, build, world)) as engine:
        emit("phase", name="measure", detail=f"{warmup_steps} + {steps} steps")
        for seconds, total in _timed_steps(config, work, model, engine, build):
            times.append(seconds)
            loss = total
        peaks = peaks_gib(world.device)
        on_gpu = world.device.type == "cuda"
        allocated = torch.cuda.max_memory_allocated(world.device) / GIB if on_gpu else 0.0
        own = [*times, peaks["peak_rss_gib"], peaks.get("peak_vram_gib", 0.0), allocated]
        *slowest, host, reserved, allocated = world.gather(torch.tensor(own)).amax(0).tolist()
    return Measured(
        warmup_s=tuple(slowest[:warmup_steps]),
        steps_s=tuple(slowest[warmup_steps:]),
        loss=loss,
        peak_reserved_gib=reserved if on_gpu else None,
        peak_allocated_gib=allocated if on_gpu else None,
        peak_host_gib=host,
    )


def random_weights(
    config: RunConfig,
    work: Workload,
    device: torch.device,
    held_elsewhere: HeldElsewhere | None = None,
) -> WanTransformer:
    """Return the transformer that `config` trains, in its shape and precision, random."""
    return random_transformer(
        work.shape,
        dtype=weights_dtype(config),
        device=device,
        fp8=fp8_spec(config),
        variant_name=work.variant.name,
        seed=config.training.seed,
        held_elsewhere=held_elsewhere,
    )


def random_batch(work: Workload, seed: int) -> Batch:
    """Return the largest batch of a config as the caches give it, filled with random numbers.

    Captions are of full length, and conditioning is what the variant takes: all as the estimate
    assumes.
    """
    shape, clip, variant = work.shape, work.clip, work.variant
    random = generator(seed, "bench")
    _, down, across = variant.vae_stride
    size = (clip.latent_frames(variant), clip.height // down, clip.width // across)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=random)

    extra, images = shape.in_channels - shape.out_channels, None
    if shape.image_dim is not None:
        tokens = shape.image_tokens * (2 if shape.image_position_embedding else 1)
        images = draw(clip.batch, tokens, shape.image_dim)
    return Batch(
        latents_BCFHW=draw(clip.batch, shape.out_channels, *size),
        context=tuple(draw(shape.text_len, shape.text_dim) for _ in range(clip.batch)),
        extra_channels_BCFHW=draw(clip.batch, extra, *size) if extra else None,
        image_context_BTD=images,
        names=tuple(f"random {index}" for index in range(clip.batch)),
        captions=(_caption(work.config),) * clip.batch,
        item_seeds=tuple(derive_seed(seed, index) for index in range(clip.batch)),
        mask_B1FHW=draw(clip.batch, 1, *size).sigmoid() if uses_masks(work.config) else None,
    )


def _random_text(work: Workload, text: str) -> torch.Tensor:
    """Return a text of full length, another one for another text."""
    random = generator(work.config.training.seed, "bench text", text)
    return torch.randn(work.shape.text_len, work.shape.text_dim, generator=random)


def _caption(config: RunConfig) -> str:
    """Return a caption with the words that techniques look for."""
    return " ".join(str(one.options("name").get("trigger", "")) for one in config.techniques)


def _timed_steps(
    config: RunConfig, work: Workload, model: TrainedModel, engine: Engine, build: BuildContext
) -> Iterator[tuple[float, float]]:
    """Yield seconds and loss of each step."""
    lr_at = learning_rate(config, build)
    # Processes that share a clip's tokens must see the same clip.
    place = engine.rank // config.distributed.sequence_parallel
    count = config.training.gradient_accumulation_steps
    batches = [random_batch(work, derive_seed(build.seed, place, index)) for index in range(count)]
    for step in range(1, build.total_steps + 1):
        batches = [_redrawn(batch, step) for batch in batches]
        started = now(engine.device)
        terms = engine.forward_backward(batches)
        engine.update(lr_at(step))
        for technique in model.techniques:
            technique.after_step(step)
        yield now(engine.device) - started, sum(terms.values())


def _redrawn(batch: Batch, step: int) -> Batch:
    """Return the batch with noise and timesteps of its own for this step."""
    return replace(batch, item_seeds=tuple(derive_seed(one, step) for one in batch.item_seeds))


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forget_peaks(device: torch.device) -> None:
    """Let a GPU's peaks count from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
