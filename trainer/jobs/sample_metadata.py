"""What a sample's file says of the models and the config that made it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.contract.config import RunConfig, SamplingSection
from trainer.contract.lora_use import LoRAUse
from trainer.contract.variants import Variant
from trainer.jobs.environment import menma_version
from trainer.jobs.sample_loras import described, uses_in
from trainer.jobs.sample_settings import sample_settings, step_cache_identity
from trainer.sampling.pipeline import Evaluations
from trainer.sampling.requests import SampleRequest
from trainer.sampling.results import describe, describe_file
from trainer.sampling.step_cache.values import StepCacheValues

NOT_OF_A_SAMPLE = frozenset(
    {"every_steps", "every_epochs", "at_start", "prompts", "prompts_file", "seed"}
    | {"wildcards", "wildcards_folder"}
    | {"loras", "format", "quality", "save_latents", "metadata", "preview_every_steps"}
)
"""Keys of `[sampling]` that do not change what a sample shows, or are in the request itself."""
_MODELS = {
    "variant": "the model",
    "base": "the base weights",
    "vae": "the VAE",
    "text_encoder": "the text encoder",
    "tokenizer": "the tokenizer",
    "image_encoder": "the image encoder",
    "step_cache_values": "what the step cache knows of the model",
    "weight_format": "memory.weight_format",
    "menma": "Menma",
}
_ABSENT_IS_NONE = frozenset({"adapter.frozen", "model.shape"})
"""Settings that are told only where there are some."""

DescribeFile = Callable[[Path], dict[str, Any]]


def sample_metadata(
    request: SampleRequest,
    loras: Sequence[LoRAUse],
    evaluations: Evaluations,
    models: Mapping[str, Any],
    *,
    describe_file: DescribeFile = describe_file,
) -> dict[str, Any]:
    """Return all that a sample's file says: enough to make it again, see `sample_like`.

    Args:
        request: what it shows.
        loras: of the run, as `request.lora_strengths` counts them.
        evaluations: how often the transformer worked for it.
        models: see `model_metadata`.
        describe_file: tells name and content of an input or a LoRA.
    """
    acting = acting_loras(request, loras)
    # Strengths are those of the LoRAs that are named; the run's list of them is not in the file.
    told = describe(replace(request, lora_strengths=None), describe_file=describe_file)
    told |= {"evaluations": asdict(evaluations)} | dict(models)
    if request.denoising.step_cache == "none":
        told.pop("step_cache_values", None)
    if acting:
        told["loras"] = lora_metadata(acting, describe_file=describe_file)
    return told


def acting_loras(request: SampleRequest, loras: Sequence[LoRAUse]) -> list[LoRAUse]:
    """Return the LoRAs that do anything in a sample, as strong as they are in it."""
    uses = uses_in(request, loras)
    return [use for use in uses if use.acts(high_noise=True) or use.acts(high_noise=False)]


def model_metadata(
    config: RunConfig,
    variant: Variant,
    files: Mapping[Any, Path],
    step_cache: StepCacheValues | None = None,
) -> dict[str, Any]:
    """Return names of models (never where they lie) and the settings that a sample depends on.

    Args:
        config: names the models, and how they compute.
        variant: the model.
        files: its transformers.
        step_cache: what is known for the samples that have a step cache.
    """
    fields = ("vae", "text_encoder", "tokenizer", "image_encoder")
    named = {field: getattr(config.model, field) for field in fields}
    known = {}
    if step_cache is not None and step_cache != StepCacheValues():
        known["step_cache_values"] = step_cache_identity(step_cache)
    return {
        "menma": menma_version(),
        "variant": variant.name,
        "base": {str(expert): path.name for expert, path in sorted(files.items())},
        **{key: path.name for key, path in named.items() if path is not None},
        "weight_format": config.memory.weight_format,
        "settings": sample_settings(config, variant),
        **known,
        "sampling": sampling_metadata(config.sampling),
    }


def sampling_metadata(sampling: SamplingSection) -> dict[str, Any]:
    """Return the defaults in `[sampling]` that a sample was made with, of files the names."""
    values = sampling.model_dump(exclude=set(NOT_OF_A_SAMPLE), exclude_none=True)
    return {key: value.name if isinstance(value, Path) else value for key, value in values.items()}


def lora_metadata(
    loras: Sequence[LoRAUse], *, describe_file: DescribeFile = describe_file
) -> list[dict[str, Any]]:
    """Return name, hash and use of each LoRA."""
    return [describe_file(lora.path) | described(lora) for lora in loras]


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say in which models two samples differ; what one of them does not say is no difference."""
    for key, words in _MODELS.items():
        before, after = made.get(key), now.get(key)
        if before and after and before != after:
            yield f"{words} is another: {_shown(after)}, and it was made with {_shown(before)}"
    before, after = made.get("settings"), now.get("settings")
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return
    for key in sorted(before.keys() & after.keys() | _ABSENT_IS_NONE):
        if before.get(key) != after.get(key):
            now_has, had = _told(after, key), _told(before, key)
            yield f"{key} is another: {now_has}, and it was made with {had}"


def _told(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "none"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)
