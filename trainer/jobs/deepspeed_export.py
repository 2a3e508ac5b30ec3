"""The job `deepspeed`: the DeepSpeed config that training would use, without training."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources
from trainer.contract.errors import ConfigError
from trainer.contract.experts import for_expert, trains_both
from trainer.contract.jobs import DeepSpeedRequest
from trainer.contract.variants import TransformerConfig, Variant
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.engine.deepspeed_config import build_deepspeed_config
from trainer.io.mapped_load import open_weights
from trainer.jobs.base import Emit
from trainer.jobs.build import build_plugin, engine_kind, pick_device
from trainer.jobs.components import settle_variant
from trainer.jobs.deepspeed_settings import deepspeed_settings
from trainer.jobs.train_parts import assemble_model
from trainer.models.wan.detect import recognise
from trainer.models.wan.transformer import WanTransformer

_ANY_BATCH = 2
"""Of how many clips: that batches are too small for a technique is for `check` to say."""


def run(request: DeepSpeedRequest, emit: Emit) -> None:
    """Job `deepspeed`; its `end` event has the config under `deepspeed`.

    Raises:
        ConfigError: the run would not use DeepSpeed, or the config is wrong.
    """
    config = load_config_with_sources(request.config, request.set).config
    emit("end", reason="done", deepspeed=exported_config(config))


def exported_config(config: RunConfig) -> dict[str, Any]:
    """Return the config that DeepSpeed gets on this machine; no weights are read.

    What is trained is counted on a model without content, of the shape that the weight file's
    header tells, or the variant where the file is not there.

    Raises:
        ConfigError: the run would not use DeepSpeed, or its parts do not fit together.
    """
    if engine_kind(config) == "local":
        asked = config.distributed.engine == "local"
        reason = "distributed.engine is local" if asked else "DeepSpeed is not installed"
        raise ConfigError(
            f"{reason}: this run would not use DeepSpeed",
            hint='--set distributed.engine="deepspeed" shows what it would be told',
        )
    variant = settle_variant(config)
    if trains_both(config):  # an engine each, told the same, or one with as much to train
        config = for_expert(config, "low_noise", variant.expert_boundary)
    device = pick_device(config)
    build = BuildContext(
        variant=variant,
        seed=config.training.seed,
        device=torch.device("meta"),
        total_steps=max(1, config.training.max_steps),
        resumes=True,  # sizes count, not what the weights begin with
    )
    factory: OptimizerFactory = build_plugin(config.optimizer, "kind", build, where="optimizer")
    model = assemble_model(config, build, _ANY_BATCH, lambda: _empty_transformer(config, variant))
    return build_deepspeed_config(
        **deepspeed_settings(config, device),
        elementwise_optimizer=factory.elementwise,
        num_trained=sum(value.numel() for value in model.trainable.values()),
        largest_weight=max(value.numel() for value in model.step.parameters()),
    )


def _empty_transformer(config: RunConfig, variant: Variant) -> WanTransformer:
    changes = dict(config.model.shape)
    high = config.model.expert == "high_noise"
    path = config.model.transformer_high_noise if high else config.model.transformer
    if path is not None and path.exists():
        shape = recognise(open_weights(path), variant.name, changes).config
    else:
        known = {field.name for field in fields(TransformerConfig)}
        named = {key: value for key, value in changes.items() if key in known}
        shape = replace(variant.transformer, **named)  # type: ignore[arg-type]  # checked by config
    with torch.device("meta"):
        return WanTransformer(shape, seed=None)
