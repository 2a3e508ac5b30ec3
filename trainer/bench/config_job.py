"""The job `bench_config`: seconds and memory of a config's training step, beside the estimate.

Needs no weights, caches or clips: the model is made of random numbers in the config's shape and
precision, and trained on random batches of the largest size that its dataset gives.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import fields
from typing import Any

import torch

from trainer.bench.stopwatch import Measured, measure_steps
from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources, place_problems
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.experts import boundary_of, for_expert, trains_both
from trainer.contract.jobs import BenchConfigRequest
from trainer.contract.memory_model import Circumstances, Gpu, estimate, gpu_of_memory
from trainer.contract.memory_model.flops import StepFlops, step_flops
from trainer.contract.memory_model.workload import Workload, workload_of
from trainer.contract.memory_rules import too_many_blocks
from trainer.contract.variants import get_variant
from trainer.engine import process_group
from trainer.engine.failures import failing_together
from trainer.engine.launch import run_workers
from trainer.engine.process_group import World
from trainer.engine.sequence import sharing_clips
from trainer.io.mapped_load import open_weights
from trainer.jobs.automatic_memory import resolve_for_training
from trainer.jobs.base import INTERRUPTED, Emit, Stopped, explain
from trainer.jobs.build import engine_kind, num_processes, pick_device
from trainer.jobs.components import with_variant
from trainer.jobs.distributed_checks import distributed_problems
from trainer.jobs.memory_checks import memory_problems
from trainer.jobs.start import machine_problems
from trainer.models.wan.detect import recognise

GIB = 2**30
_WEIGHT_FILES = ("transformer", "transformer_high_noise")
_SETTINGS = ("adapter", "objective", "optimizer", "training", "memory", "distributed")


def run(request: BenchConfigRequest, emit: Emit) -> None:
    """Job `bench_config`; one `end` event with the figures of `figures`.

    Raises:
        ConfigError: everything that is wrong with the config, or cannot work here.
        MenmaError: the step failed.
    """
    config = read(request)
    processes = num_processes(config)
    if processes > 1 and not process_group.in_group():
        code = run_workers([sys.executable, "-m", "trainer", *sys.argv[1:]], processes)
        if code == INTERRUPTED:
            raise Stopped
        if code:
            raise SystemExit(code)  # the process that failed has said why
        return
    device = pick_device(config)
    with process_group.joined(device.type, config.distributed.timeout_s) as place:
        tell = emit if place.rank == 0 else _silent
        with failing_together(place, explain):
            distributed = config.distributed
            world = sharing_clips(place, distributed.sequence_parallel, distributed.timeout_s)
            config = resolve_for_training(config, get_variant(config.model.variant), world, tell)
            work = workload_of(config, num_gpus=world.world_size)
            measured = measure_steps(
                config, work, world, tell, steps=request.steps, warmup_steps=request.warmup_steps
            )
        tell("end", reason="done", **figures(config, work, world, measured))


def read(request: BenchConfigRequest) -> RunConfig:
    """Return the config to be measured: its variant named, its weight files left out.

    Of a run with both experts of Wan 2.2: a step of one, which takes as long as the other's. Where
    there is a weight file, its header tells variant and shape, as in training.

    Raises:
        ConfigError: everything that is wrong with it, or cannot work here.
        ModelFileError: the weight file is there and cannot be used.
    """
    loaded = load_config_with_sources(request.config, request.set)
    if loaded.config.distributed.hostfile is not None:
        problem = Problem(
            "a benchmark measures on one machine",
            "distributed.hostfile",
            hint="leave it out of the config that is measured",
        )
        raise ConfigError(problems=place_problems([problem], loaded.sources))
    config = loaded.config
    if trains_both(config):
        config = for_expert(config, "low_noise", boundary_of(config))
    config = _in_shape_of_its_file(config)
    work = workload_of(with_nothing_automatic(config))
    config = with_variant(config, work.variant)
    model = config.model.model_copy(update=dict.fromkeys(_WEIGHT_FILES))
    config = config.model_copy(update={"model": model})
    problems = [
        *machine_problems(config),
        *distributed_problems(config),
        *memory_problems(config, trains=True),
    ]
    wanted = config.memory.blocks_to_swap
    if wanted != "auto" and (blocks := too_many_blocks(wanted, work.shape.num_layers)) is not None:
        problems.append(blocks)
    if problems:
        raise ConfigError(problems=place_problems(problems, loaded.sources))
    return config


def figures(config: RunConfig, work: Workload, world: World, measured: Measured) -> dict[str, Any]:
    """Return measured and estimated figures as plain values; None where there is none.

    `tflop` is of one process's step: a forward, what forward and backward need, and what is
    computed, recomputing included. MFU is needed / (seconds · the GPU's bf16 peak). The estimated
    peak leaves out CUDA's context, which torch's allocator does not see.
    """
    card = card_of(world.device)
    guess = estimate(config, card, Circumstances(num_gpus=world.world_size))
    training = guess.phase("training")
    context = training.parts["CUDA context"]
    peak_gib = (training.peak_bytes - context) / GIB
    flops, seconds = step_flops(work), statistics.median(measured.steps_s)
    return {
        "name": config.name,
        "variant": work.variant.name,
        "clip": str(work.clip),
        "batch": work.clip.batch,
        "tokens": work.tokens,
        "text_tokens": work.shape.text_len,
        "settings": settings(config),
        "device": device_name(world.device),
        "torch": torch.__version__,
        "engine": engine_kind(config),
        "world_size": world.world_size,
        "step_s": {
            "median": round(seconds, 4),
            "min": round(min(measured.steps_s), 4),
            "max": round(max(measured.steps_s), 4),
            "steps": len(measured.steps_s),
        },
        "warmup_s": [round(value, 4) for value in measured.warmup_s],
        "loss": measured.loss,
        "memory_gib": {
            "peak_reserved": _rounded(measured.peak_reserved_gib, 3),
            "peak_allocated": _rounded(measured.peak_allocated_gib, 3),
            "peak_host": round(measured.peak_host_gib, 3),
        },
        **_arithmetic(flops, seconds, card),
        "estimate": {
            "gpu": None if card is None else card.name,
            "step_s": _rounded(guess.step_seconds, 4),
            "peak_gib": round(peak_gib, 3),
            "context_gib": round(context / GIB, 3),
        },
        "error_percent": {
            "step_s": _error(guess.step_seconds, seconds),
            "peak": _error(peak_gib, measured.peak_reserved_gib),
        },
    }


def with_nothing_automatic(config: RunConfig) -> RunConfig:
    """Return the config with 0 in the place of `auto`: enough to tell sizes."""
    memory = config.memory.model_copy(update=dict.fromkeys(config.memory.automatic, 0))
    return config.model_copy(update={"memory": memory})


def _in_shape_of_its_file(config: RunConfig) -> RunConfig:
    """Return the config with the sizes of its weight file that are not the released model's."""
    model = config.model
    high = model.expert == "high_noise"
    path = model.transformer_high_noise if high else model.transformer
    if path is None or not path.exists():
        return config
    file = recognise(open_weights(path), model.variant, dict(model.shape))
    released = get_variant(file.variant_name).transformer
    sizes = {field.name: getattr(file.config, field.name) for field in fields(file.config)}
    own = {
        name: size
        for name, size in sizes.items()
        if size != getattr(released, name) and isinstance(size, int | float)
    }
    update = {"variant": file.variant_name, "shape": {**model.shape, **own}}
    return config.model_copy(update={"model": model.model_copy(update=update)})


def settings(config: RunConfig) -> dict[str, Any]:
    """Return what of the config bears upon a step, by key.

    Options of chosen plug-ins are all listed; of the rest, what is not the default.
    """
    return {
        f"{section}.{key}": value
        for section in _SETTINGS
        for key, value in getattr(config, section)
        .model_dump(mode="json", exclude_defaults=True)
        .items()
    } | {"techniques": [section.name for section in config.techniques]}


def card_of(device: torch.device) -> Gpu | None:
    """Return what is known of a CUDA device; None for a CPU."""
    if device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory
    return gpu_of_memory(memory / GIB, torch.cuda.get_device_name(device))


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _arithmetic(flops: StepFlops, seconds: float, card: Gpu | None) -> dict[str, Any]:
    rate = flops.needed / seconds / 1e12
    known = card is not None and card.bf16_tflops
    return {
        "tflop": {
            "forward": flops.forward / 1e12,
            "needed": flops.needed / 1e12,
            "computed": flops.computed / 1e12,
        },
        "tflop_per_s": rate,
        "mfu": round(rate / card.bf16_tflops, 4) if card is not None and known else None,
    }


def _error(estimated: float | None, measured: float | None) -> float | None:
    """Return by how many per cent the estimate is above what was measured."""
    if estimated is None or not measured:
        return None
    return round(100 * (estimated / measured - 1), 2)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _silent(kind: str, /, **fields: Any) -> None:
    """Say nothing: rank 0 speaks."""
