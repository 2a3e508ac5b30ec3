"""The job `bench_sampling`: seconds and memory of a config's sampling steps, on random weights.

Needs no files: the transformer is made of random numbers in the config's shape and precision and
set up as `[memory]` says, then `menma sample`'s own loop makes a video of the dataset's largest
size from text, with guidance. Text encoder and VAE are not part of it.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch

from trainer.bench.config_job import card_of, device_name, read, with_nothing_automatic
from trainer.bench.stopwatch import forget_peaks, now, random_weights
from trainer.contract.config import Prompt, RunConfig
from trainer.contract.jobs import BenchConfigRequest
from trainer.contract.memory_model import Gpu, gpu_of_memory
from trainer.contract.memory_model.denoising import WorkingSet
from trainer.contract.memory_model.estimating import estimate_inference
from trainer.contract.memory_model.forwards import forward_flops
from trainer.contract.memory_model.workload import Workload, workload_of
from trainer.core.rng import generator
from trainer.jobs.automatic_memory import resolve_for_forwards, working_set_of
from trainer.jobs.base import Emit
from trainer.jobs.build import freeze, make_base, pick_device
from trainer.sampling.pipeline import SamplingModels, generate
from trainer.sampling.requests import SampleRequest
from trainer.training.reporter import peaks_gib

GIB: Final = 2**30
VIDEO_STEPS: Final = 50
"""Of the video whose seconds are given: the Wan repositories' default."""
TEXT_TOKENS: Final = {"prompt": 80, "negative": 126}
"""Of a prompt as people write them, and of the negative prompt that the repositories recommend."""


def run(request: BenchConfigRequest, emit: Emit) -> None:
    """Job `bench_sampling`; one `end` event with the figures of `figures`.

    Raises:
        ConfigError: everything that is wrong with the config, or cannot work here; the model needs
            images, of which there are none.
        MenmaError: sampling failed.
    """
    config = read(request)
    device = pick_device(config)
    work = workload_of(with_nothing_automatic(config))
    config = resolve_for_forwards(config, work.variant, device, [working_set(work)], emit)
    work = workload_of(config)
    forget_peaks(device)
    emit("phase", name="load", detail="random weights")
    weights = partial(random_weights, config, work)
    transformer = freeze(make_base(config, weights, device=device))
    sample = request_of(work, request.warmup_steps + request.steps)
    random = generator(config.training.seed, "bench text")
    models = SamplingModels(
        variant=work.variant,
        transformer=lambda _: transformer,
        contexts={
            text: torch.randn(tokens, work.shape.text_dim, generator=random)
            for text, tokens in TEXT_TOKENS.items()
        },
        device=device,
    )
    emit("phase", name="measure", detail=f"{request.warmup_steps} + {request.steps} steps")
    marks = [now(device)]
    generate(models, sample, on_step=lambda _done, _steps: marks.append(now(device)))
    times = [after - before for before, after in pairwise(marks)]
    warmup, steps = times[: request.warmup_steps], times[request.warmup_steps :]
    emit("end", reason="done", **figures(config, work, device, warmup, steps))


def request_of(work: Workload, num_steps: int) -> SampleRequest:
    """Return the request: the config's largest clip, with guidance at every step."""
    prompt = Prompt.model_validate(
        {
            "prompt": "prompt",
            "negative_prompt": "negative",
            "width": work.clip.width,
            "height": work.clip.height,
            "num_frames": work.clip.num_frames,
            "num_steps": num_steps,
            "guidance_scale": 5.0,
            "guidance_scale_high_noise": 5.0,
            "seed": 0,
        }
    )
    return SampleRequest.of(prompt, work.variant)


def working_set(work: Workload) -> WorkingSet:
    """Return what the transformer works on: one sample at a time, with guidance."""
    return working_set_of(request_of(work, VIDEO_STEPS), work.variant)


def sampling_peak_gib(work: Workload, card: Gpu | None) -> float:
    """Return the estimated peak of sampling, without CUDA's context."""
    guess = estimate_inference(work, [working_set(work)], card or gpu_of_memory(80))
    phase = guess.phase("sampling")
    return (phase.peak_bytes - phase.parts["CUDA context"]) / GIB


def figures(
    config: RunConfig,
    work: Workload,
    device: torch.device,
    warmup_s: list[float],
    steps_s: list[float],
) -> dict[str, Any]:
    """Return what was measured as plain values; None where there is none.

    `video_s` is extrapolated: VIDEO_STEPS times the median step.
    """
    card, step_s = card_of(device), statistics.median(steps_s)
    flops = sum(
        forward_flops(work.shape, work.tokens, text_rows=tokens).total
        for tokens in TEXT_TOKENS.values()
    )
    rate = flops / step_s / 1e12
    on_gpu = device.type == "cuda"
    peaks = peaks_gib(device)
    peak = torch.cuda.max_memory_reserved(device) / GIB if on_gpu else None
    expected = sampling_peak_gib(work, card)
    return {
        "name": config.name,
        "variant": work.variant.name,
        "clip": str(work.clip),
        "tokens": work.tokens,
        "device": device_name(device),
        "torch": torch.__version__,
        "step_s": {
            "median": round(step_s, 4),
            "min": round(min(steps_s), 4),
            "max": round(max(steps_s), 4),
            "steps": len(steps_s),
        },
        "warmup_s": [round(value, 4) for value in warmup_s],
        "video_s": round(VIDEO_STEPS * step_s, 2),
        "video_steps": VIDEO_STEPS,
        "memory_gib": {
            "peak_reserved": None if peak is None else round(peak, 3),
            "peak_host": peaks["peak_rss_gib"],
        },
        "tflop": flops / 1e12,
        "tflop_per_s": rate,
        "mfu": round(rate / card.bf16_tflops, 4) if card is not None and card.bf16_tflops else None,
        "estimate": {"peak_gib": round(expected, 3)},
        "error_percent": {"peak": None if not peak else round(100 * (expected / peak - 1), 2)},
    }
