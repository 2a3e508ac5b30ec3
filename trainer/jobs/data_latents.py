"""The job `data_latents`: figures of what is cached, without decoding it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.contract.config_io import load_config_with_sources
from trainer.contract.errors import DataError
from trainer.contract.files import write_json
from trainer.contract.jobs import DataLatentsRequest
from trainer.data.entries import read_entry
from trainer.data.items import TrainingItem, load_cached_dataset
from trainer.data.latent_report import figures_of, latent_report
from trainer.jobs.base import Emit
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import settle_variant
from trainer.jobs.run_items import cache_settings


def run(request: DataLatentsRequest, emit: Emit) -> None:
    """Read every cached item and write the report (`latent_report.latent_report`) as JSON.

    To it come `config`, `num_items`, `damaged` (entries that cannot be read) and
    `captions_not_finite` (captions whose encoding has NaN or infinite values).

    Raises:
        DataError: the dataset is not cached, or the cache is out of date; or no entry can be read.
        ConfigError: the config is wrong.
        DiskError: the report cannot be written.
    """
    config = load_config_with_sources(request.config, request.set).config
    settings = cache_settings(config, settle_variant(config))
    cached = load_cached_dataset(config.load_all_sources(), settings, config=str(request.config))
    entries = {item.latents: item for item in cached.items}  # copies of a clip share theirs
    progress, figures, damaged = progress_events(emit), [], []
    for done, item in enumerate(entries.values(), start=1):
        try:
            latents_CFHW = read_entry(item.latents, item.latents_key)["latents"]
            figures.append(figures_of(item.name, latents_CFHW))
        except (DataError, KeyError) as error:
            damaged.append(_damaged(item, error))
        progress("items", done, len(entries), item.name)
    if not figures:
        raise DataError("no cached item can be read", hint="run `menma cache` again")
    report: Mapping[str, Any] = {
        "config": str(request.config),
        "num_items": len(entries),
        "damaged": damaged,
        "captions_not_finite": _bad_captions(cached.items),
        **latent_report(figures, request.z_limit),
    }
    write_json(request.output, report)
    emit("end", reason="done", num_items=len(entries), outliers=report["outliers"])


def _damaged(item: TrainingItem, error: Exception) -> dict[str, str]:
    words = error.message if isinstance(error, DataError) else "it has no latents in it"
    return {"name": item.name, "file": str(item.latents), "message": words}


def _bad_captions(items: tuple[TrainingItem, ...]) -> list[str]:
    """Return the items whose caption is encoded as NaN or infinity, or cannot be read."""
    state: dict[Path, bool] = {}
    for item in items:
        if item.context not in state:
            state[item.context] = _is_finite(item)
    return [item.name for item in items if not state[item.context]]


def _is_finite(item: TrainingItem) -> bool:
    try:
        context = read_entry(item.context, item.context_key).get("context")
    except DataError:
        return False
    return context is not None and bool(torch.isfinite(context).all())
