"""Sampling the shipped model with a step cache, beside the full run of the same request."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from trainer.bench.result import Measurement, timed_in_turns
from trainer.contract.config import Prompt
from trainer.contract.errors import RunError
from trainer.contract.variants import get_variant
from trainer.jobs.step_cache_values import SUFFIX
from trainer.models import load_text_encoder, load_transformer
from trainer.nano.files import T2V_VARIANT, asset
from trainer.nano.quality import FLOW_SHIFT, GUIDANCE_SCALE, NUM_FRAMES, NUM_STEPS, SIZE
from trainer.sampling.pipeline import Evaluations, SamplingModels, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.values import StepCacheValues, read_calibration

LIMIT = round(1 / 1.5, 3)
LEAST_COSINE = 0.95
"""Of the latents and those of the full run."""
METHODS = ("teacache", "magcache")
_TEXTS = ("a red circle moves to the left on a plain white background", "a video")


def measure(*, pairs: int = 5) -> Measurement:
    """Return the processor time of the slower cache over that of the full run, thresholds default.

    Raises:
        RunError: a cache leads too far from the full run.
    """
    models = _models()
    full, _ = _sample(models, "none")
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for method in METHODS:
        result, passes = _sample(models, method)
        cosine = float(torch.cosine_similarity(result.flatten(), full.flatten(), dim=0))
        if cosine < LEAST_COSINE:
            raise RunError(f"{method} leads away from the full run: cosine {cosine:.3f}")
        timed = timed_in_turns(
            partial(_sample, models, method), partial(_sample, models, "none"), pairs
        )
        ratios[method] = statistics.median(ours[0] / theirs[0] for ours, theirs in timed)
        figures |= {
            f"{method}_ratio": round(ratios[method], 3),
            f"{method}_cosine": round(cosine, 4),
            f"{method}_evaluations": passes.computed,
        }
    return Measurement(
        name="sample_cache",
        what="sampling with a step cache / without",
        value=max(ratios.values()),
        unit="ratio",
        limit=LIMIT,
        figures={"evaluations": 2 * NUM_STEPS, **figures},
    )


def _models() -> SamplingModels:
    encoder = load_text_encoder(asset("text_encoder"), dtype=torch.float32)
    transformer = load_transformer(asset("t2v"))
    weights = asset("t2v")
    return SamplingModels(
        variant=get_variant(T2V_VARIANT),
        transformer=lambda _expert: transformer,
        contexts=dict(zip(_TEXTS, encoder(list(_TEXTS)), strict=True)),
        step_cache=StepCacheValues(read_calibration(weights.with_name(weights.stem + SUFFIX))),
    )


def _sample(models: SamplingModels, method: str) -> tuple[Tensor, Evaluations]:
    prompt = Prompt(
        prompt=_TEXTS[0],
        negative_prompt=_TEXTS[1],
        width=SIZE,
        height=SIZE,
        num_frames=NUM_FRAMES,
        num_steps=NUM_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        flow_shift=FLOW_SHIFT,
        step_cache=method,
    )
    ends: list[Evaluations] = []
    latents = generate(models, SampleRequest.of(prompt, models.variant), on_end=ends.append)
    return latents, ends[0]
