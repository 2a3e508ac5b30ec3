"""The cached items of a config: those to train on, and those to validate on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import validation_timesteps
from trainer.contract.errors import DataError
from trainer.contract.variants import Variant
from trainer.data.cache_settings import CacheSettings
from trainer.data.fingerprint import model_identity
from trainer.data.holdout import Holdout
from trainer.data.items import CachedDataset, TrainingItem, fingerprint, load_cached_dataset
from trainer.jobs.build import technique_texts
from trainer.jobs.components import text_encoder_identity
from trainer.training.validation import ValidationSettings


@dataclass(frozen=True, slots=True)
class RunItems:
    """What the caches hold for a run."""

    training: CachedDataset
    """Its items are those to train on."""
    validation: tuple[TrainingItem, ...]
    """None of them is trained on; empty where the config has no validation."""
    shared_clips: int
    """Clips of `validation.sources` whose content is also that of a training clip."""


def load_run_items(config: RunConfig, variant: Variant, config_name: str) -> RunItems:
    """Open the caches of a config's dataset and of its validation sources.

    Args:
        config: the run.
        variant: its variant, settled.
        config_name: for the hint `menma cache CONFIG`.

    Raises:
        DataError: a cache is missing or out of date, or one side has no items.
    """
    cached = load_cached_dataset(
        config.load_all_sources(),
        cache_settings(config, variant),
        config=config_name,
        texts=partial(technique_texts, config),
    )
    training, validation = holdout_of(config).split(cached.items)
    section = config.validation
    if not training and section.split:
        raise DataError(
            f"validation.split = {section.split:g} holds out the only clip of the dataset",
            hint="add other clips, or name those to validate on in validation.sources",
        )
    if not training:
        raise DataError("the dataset has no items to train on", hint="run `menma check` on it")
    if section.sources and not validation:
        raise DataError(
            "validation.sources have no items to validate on", hint="run `menma check` on it"
        )
    return RunItems(
        replace(cached, items=training, fingerprint=fingerprint(training)),
        validation,
        len({item.clip for item in validation} & {item.clip for item in training}),
    )


def load_validation_items(
    config: RunConfig, variant: Variant, config_name: str
) -> tuple[TrainingItem, ...]:
    """Return the items to validate on; empty where the config has neither split nor sources.

    Raises:
        DataError: a cache is missing or out of date, or one side has no items.
    """
    return load_run_items(config, variant, config_name).validation


def validation_settings(config: RunConfig, variant: Variant) -> ValidationSettings:
    """Return what is measured: at the timesteps at which the trained expert works."""
    section = config.validation
    return ValidationSettings(
        timesteps=validation_timesteps(config, variant.expert_boundary),
        noises_per_timestep=section.noises_per_timestep,
        max_items=section.max_items,
        batch_size=section.batch_size,
        use_masks=section.use_masks,
        seed=section.seed,
    )


def holdout_of(config: RunConfig) -> Holdout:
    """Return how the config parts its clips."""
    return Holdout(
        first_source=len(config.dataset.load().sources),
        share=config.validation.split,
        seed=config.validation.seed,
    )


def cache_settings(config: RunConfig, variant: Variant) -> CacheSettings:
    """Return what the caches must have been made with; encoders not named are not compared."""
    model = config.model
    text_encoder = None
    if model.text_encoder is not None:
        text_encoder = text_encoder_identity(config, model.text_encoder)
    return CacheSettings.of(
        variant,
        vae=model_identity(model.vae) if model.vae else None,
        text_encoder=text_encoder,
        image_encoder=model_identity(model.image_encoder) if model.image_encoder else None,
        dtype=config.memory.cache_dtype,
    )
