"""What an output file says about itself: the string table of its safetensors header.

Three families of keys: `ss_…` as kohya-style trainers write and web sites read, `modelspec.…` of
the Stability AI model metadata specification 1.0.0, and `menma.…` for what those have no name for.
Only names of files are written, never folders; captions and prompts stay out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import trained_timesteps
from trainer.contract.experts import boundary_of
from trainer.contract.variants import VARIANTS

IMPLEMENTATION = "https://github.com/Wan-Video/Wan2.1"
_PRIVATE: Any = {
    **dict.fromkeys(("dataset", "sampling", "output", "logging", "preset"), True),
    "validation": {"sources"},
    "distributed": {"nvme_path", "hostfile"},
}
"""Sections and fields that tell of the user's disk, network or words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """What a run knows and its config does not. Times are Unix seconds."""

    session_id: str
    started_at: float
    finished_at: float
    step: int
    total_steps: int
    epoch: int
    num_items: int
    num_batches_per_epoch: int
    world_size: int = 1
    version: str = ""
    """Version of Menma."""


def training_metadata(
    config: RunConfig, facts: TrainingFacts, *, variant: str, expert: str | None = None
) -> dict[str, str]:
    """Return the header of a trained output file.

    What describes the tensors themselves (`ss_network_…`, hashes) is set by whoever writes them.

    Args:
        config: as it ran.
        facts: how far it ran.
        variant: name in `VARIANTS`, "" when the model is of no released size.
        expert: `high_noise` or `low_noise` for Wan 2.2, `shared` for both, else None.
    """
    table: dict[str, Any] = {
        **_run(config, facts),
        **_objective(config, variant),
        **_model(config, variant),
        **model_spec(config, facts.finished_at, variant),
        "menma.kind": "lora" if config.adapter.kind != "none" else "transformer",
        "menma.version": facts.version,
        "menma.variant": variant,
        "menma.expert": expert,
        "menma.frozen": [
            {"file": one.path.name, "strength": one.strength}
            for one in config.adapter.companions(expert)
        ]
        or None,
        "menma.run_config": json.dumps(_public_config(config), sort_keys=True),
    }
    return as_strings(table)


def as_strings(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the table with every value as text; None and "" are left out."""
    return {key: _text(value) for key, value in table.items() if value is not None and value != ""}


def model_spec(config: RunConfig, finished_at: float, variant: str) -> dict[str, Any]:
    """Return the `modelspec.…` keys."""
    output = config.output
    low, high = _timesteps(config, variant)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_family(variant)}/{_kind(config)}",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": output.title or config.name,
        "modelspec.author": output.author,
        "modelspec.description": output.description,
        "modelspec.license": output.license,
        "modelspec.tags": ", ".join(output.tags),
        "modelspec.date": datetime.fromtimestamp(finished_at, UTC).isoformat(timespec="seconds"),
        "modelspec.timestep_range": f"{low:g},{high:g}",
    }


def _run(config: RunConfig, facts: TrainingFacts) -> dict[str, Any]:
    training, optimizer = config.training, config.optimizer
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "ss_output_name": config.name,
        "ss_steps": facts.step,
        "ss_epoch": facts.epoch,
        "ss_num_train_items": facts.num_items,
        "ss_num_batches_per_epoch": facts.num_batches_per_epoch,
        "ss_num_epochs": training.epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.memory.checkpointed_every > 0,
        "ss_seed": training.seed,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_lr_scheduler": config.lr_schedule.kind,
        "ss_lr_warmup_steps": config.lr_schedule.warmup_of(facts.total_steps),
        "ss_optimizer": _with_options(optimizer.kind, optimizer.options("kind")),
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_mixed_precision": "bf16" if config.memory.weight_format != "fp32" else "no",
        "menma.world_size": facts.world_size,
    }


def _objective(config: RunConfig, variant: str) -> dict[str, Any]:
    objective = config.objective
    low, high = _timesteps(config, variant)
    sampler = objective.options("timestep_sampler")
    return {
        "ss_timestep_sampling": objective.timestep_sampler,
        "ss_weighting_scheme": objective.weighting,
        "ss_discrete_flow_shift": sampler.get("flow_shift"),
        "ss_sigmoid_scale": sampler.get("sigmoid_scale"),
        "ss_min_timestep": f"{low:g}",
        "ss_max_timestep": f"{high:g}",
        "ss_preserve_distribution_shape": objective.preserve_distribution_shape,
    }


def _model(config: RunConfig, variant: str) -> dict[str, Any]:
    model = config.model
    high = config.model.expert == "high_noise" and model.transformer_high_noise is not None
    transformer = model.transformer_high_noise if high else model.transformer
    return {
        "ss_base_model_version": _family(variant),
        "ss_sd_model_name": transformer.name if transformer is not None else None,
        "ss_vae_name": model.vae.name if model.vae is not None else None,
    }


def _timesteps(config: RunConfig, variant: str) -> tuple[float, float]:
    """Return the range that was trained: an expert's own, where the config gives none."""
    return trained_timesteps(config, boundary_of(config, VARIANTS.get(variant)))


def _family(variant: str) -> str:
    return variant.split("-", 1)[0] if variant in VARIANTS else "wan"


def _kind(config: RunConfig) -> str:
    return "lora" if config.adapter.kind != "none" else "transformer"


def _with_options(name: str, options: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{name}({listed})" if listed else name


def _public_config(config: RunConfig) -> Any:
    sections = config.model_dump(mode="python", exclude=_PRIVATE, exclude_defaults=True)
    return _names_only(sections)


def _names_only(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _names_only(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_names_only(part) for part in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    return json.dumps(value, sort_keys=True)
