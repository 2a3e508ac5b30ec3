"""A video sampled with a step cache by processes that share it, and by one alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.contract.config import Prompt
from trainer.contract.variants import get_variant
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.pipeline import Evaluations, SamplingModels, generate
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.values import (
    Calibration,
    ExpertValues,
    Polynomial,
    StepCacheValues,
)

VARIANT = get_variant("wan2.1-t2v-1.3b")
STEPS = 8


def sampled(model: WanTransformer, method: str) -> tuple[Tensor, Evaluations]:
    """Return latents of 18 tokens and how often the blocks ran."""
    random = torch.Generator().manual_seed(4)
    texts = ("a cat", VARIANT.negative_prompt)
    values = ExpertValues(
        magcache=dict.fromkeys(("positive", "negative"), (1.0,) + (1.02,) * (STEPS - 1)),
        teacache={"plain": Polynomial(coefficients=(0.05, 0.0))},
    )
    calibration = Calibration(
        variant=VARIANT.name,
        models={},
        num_steps=STEPS,
        flow_shift=5.0,
        num_prompts=1,
        experts={"low_noise": values},
    )
    models = SamplingModels(
        variant=VARIANT,
        transformer=lambda _: model,
        contexts={text: torch.randn(5, 32, generator=random) for text in texts},
        step_cache=StepCacheValues(calibration),
    )
    fields: dict[str, Any] = {"prompt": "a cat", "width": 48, "height": 48, "num_frames": 5}
    more = {"num_steps": STEPS, "step_cache": method, "step_cache_threshold": 0.3}
    request = SampleRequest.of(Prompt.model_validate(fields | more), VARIANT)
    ends: list[Evaluations] = []
    return generate(models, request, on_end=ends.append), ends[0]
