"""Settings that change a sample's bits and are not in its request.

One list for both who need it: a sample's file tells them, and a sheet knows its samples by them.
Left out is what gives the same bits: swapped blocks, the cache of texts, what is for the backward.
"""

from __future__ import annotations

from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import is_fp8
from trainer.contract.variants import Variant
from trainer.data.fingerprint import digest
from trainer.jobs.build import pick_device
from trainer.jobs.components import text_encoder_device
from trainer.sampling.step_cache.values import StepCacheValues

_TRANSFORMER = ("attention", "feed_forward_chunks", "attention_chunks", "compile_blocks")
_FP8 = ("fp8_format", "fp8_matmul")
_VAE = ("vae_dtype", "vae_tile")


def sample_settings(config: RunConfig, variant: Variant) -> dict[str, Any]:
    """Return all of them by key of the config, as plain JSON values; of files the names.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    return drawing_settings(config, variant) | decoding_settings(config)


def drawing_settings(config: RunConfig, variant: Variant) -> dict[str, Any]:
    """Return those of the latents: all but the VAE's, which count where inputs are encoded.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    memory, device = config.memory, pick_device(config)
    fields = [*_TRANSFORMER, *(_FP8 if is_fp8(config) else ()), "text_encoder_dtype"]
    found: dict[str, Any] = {f"memory.{field}": getattr(memory, field) for field in fields}
    found["memory.text_encoder_device"] = text_encoder_device(config, device).type
    found["distributed.device"] = device.type
    if variant.experts:
        found["model.expert_boundary"] = variant.expert_boundary
    if config.model.shape:
        found["model.shape"] = dict(config.model.shape)
    if config.adapter.frozen:
        found["adapter.frozen"] = [
            one.model_dump(mode="json", exclude_none=True) | {"path": one.path.name}
            for one in config.adapter.frozen
        ]
    return found


def decoding_settings(config: RunConfig) -> dict[str, Any]:
    """Return those of the frames that latents become."""
    return {f"memory.{field}": getattr(config.memory, field) for field in _VAE}


def step_cache_identity(values: StepCacheValues) -> str:
    """Return what two samples have in common whose step cache knows the same of the model."""
    measured = values.measured and values.measured.model_dump(mode="json")
    return digest([measured, values.published])
