"""The step cache that a request asks for, and whether enough is known for it."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.contract.catalog import STEP_CACHES
from trainer.contract.errors import ConfigError
from trainer.contract.variants import Expert, Variant
from trainer.sampling.guidance import NEGATIVE, POSITIVE, needs_negative
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.cache import StepCache
from trainer.sampling.step_cache.drift import StepCacheMethod
from trainer.sampling.step_cache.values import ExpertValues, StepCacheValues


def step_cache_of(
    request: SampleRequest, variant: Variant, known: StepCacheValues
) -> StepCache | None:
    """Return the request's step cache; None: it has none.

    Raises:
        ConfigError: too little is known of the model.
    """
    options = request.denoising
    if options.step_cache == "none":
        return None
    method: type[StepCacheMethod] = STEP_CACHES.load(options.step_cache)
    values = known.of(variant.name, request.width * request.height)
    experts: Sequence[Expert] = ("low_noise", "high_noise") if variant.experts else ("low_noise",)
    for expert in experts:
        names = [POSITIVE]
        if needs_negative(request.guidance_scale[expert == "high_noise"]):
            names.append(NEGATIVE)
        if method.lacks(options, values.get(expert, ExpertValues()), names):
            model = f"{variant.name}'s {expert} expert" if variant.experts else variant.name
            raise ConfigError(
                f"step_cache {options.step_cache} does not know {model} yet"
                + ("" if len(names) == 1 else " with guidance"),
                hint="measure it once: menma sample --calibrate CONFIG",
            )
    return StepCache(method, options, values)
