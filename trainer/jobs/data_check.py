"""The job `data_check`: what a config's dataset will become, written as one JSON report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources
from trainer.contract.dataset_config import DatasetConfig, SourceOptions
from trainer.contract.errors import DataError, ModelFileError, UserError
from trainer.contract.files import write_json
from trainer.contract.jobs import ConfigRequest, DataCheckRequest
from trainer.contract.variants import Variant
from trainer.data.cache_index import find_section, read_index
from trainer.data.cache_settings import CacheSettings
from trainer.data.checks import DatasetCheck, Depth, check_dataset
from trainer.data.entries import LATENTS_SUFFIX, TEXT_SUFFIX
from trainer.data.items import load_cached_dataset
from trainer.data.report import ReportContext, report_of
from trainer.io.mapped_load import open_weights
from trainer.jobs.base import Emit
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import settle_variant
from trainer.jobs.run_items import cache_settings, holdout_of
from trainer.models.wan.text_encoder import tokenizer_of
from trainer.models.wan.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class LookedDataset:
    """A config and what its dataset has been found to be."""

    config: RunConfig
    variant: Variant
    dataset: DatasetConfig
    """`validation.sources` after its own."""
    checked: DatasetCheck


def run(request: DataCheckRequest, emit: Emit) -> None:
    """Look at every clip and caption and write the report (`trainer.data.report.report_of`).

    To it come `config`, `strict`, and `ok`: whether caching would go on. Weight files are not
    needed: without a tokenizer captions are not counted in tokens, and a note says so.

    Raises:
        ConfigError: the config is wrong, or its variant is not known.
        DiskError: the report cannot be written.
    """
    looked = look_at_dataset(request, emit, "frames" if request.decode else "packets")
    config, checked, strict = looked.config, looked.checked, looked.dataset.general.strict
    counts, note = _token_counts(config, checked)
    context = ReportContext(
        variant=looked.variant,
        token_counts=counts,
        caches=list(_caches(config, looked.variant, looked.dataset)),
    )
    report = report_of(checked, context)
    report["notes"] += [note] if note else []
    ok = checked.clips > 0 and not (strict and checked.problems)
    write_json(
        request.output, {"config": str(request.config), "ok": ok, "strict": strict, **report}
    )
    emit("end", reason="done", ok=ok, **report["counts"])


def look_at_dataset(request: ConfigRequest, emit: Emit, depth: Depth) -> LookedDataset:
    """Read a config and look at its clips; files of models are not asked for.

    Raises:
        ConfigError: the config is wrong, or its variant is not known.
        ModelFileError: the transformer's file is not of the variant that is given.
    """
    config = load_config_with_sources(request.config, request.set).config
    variant = settle_variant(config)
    dataset = config.load_all_sources()
    progress = progress_events(emit)
    section = config.validation
    checked = check_dataset(
        dataset,
        variant,
        holdout=holdout_of(config) if section.split or section.sources else None,
        depth=depth,
        report=lambda done, total, name: progress("clips", done, total, name),
    )
    return LookedDataset(config, variant, dataset, checked)


def _token_counts(config: RunConfig, checked: DatasetCheck) -> tuple[Mapping[str, int] | None, str]:
    """Return the tokens of each caption, or None and why there are none."""
    try:
        tokenizer = _tokenizer(config)
    except UserError as error:
        return None, f"captions are not counted in tokens: {error.message}"
    captions = {
        clip.item.caption
        for looked in checked.sources
        for clip in (*looked.training, *looked.validation)
    }
    return {caption: len(tokenizer.encode(caption)) for caption in captions}, ""


def _tokenizer(config: RunConfig) -> Tokenizer:
    model = config.model
    if model.tokenizer is not None:
        return load_tokenizer(model.tokenizer)
    if model.text_encoder is None or not model.text_encoder.exists():
        raise ModelFileError("that takes model.tokenizer or model.text_encoder")
    return tokenizer_of(open_weights(model.text_encoder), None)


def _caches(
    config: RunConfig, variant: Variant, dataset: DatasetConfig
) -> Iterator[dict[str, Any]]:
    """Yield what the cache of each source is; a folder that several share counts for each."""
    settings, why = None, ""
    try:
        settings = cache_settings(config, variant)
    except UserError as error:
        why = error.message
    for source in dataset.sources:
        state, detail = "unknown", why
        if settings is not None:
            state, detail = _cache_state(source, settings, dataset)
        entries, num_bytes = _folder_size(source.cache_path)
        yield {
            "folder": str(source.cache_path),
            "state": state,
            "detail": detail,
            "entries": entries,
            "bytes": num_bytes,
        }


def _cache_state(
    source: SourceOptions, settings: CacheSettings, dataset: DatasetConfig
) -> tuple[str, str]:
    """Return `cached`, `out of date` (and why) or `not cached`."""
    if find_section(read_index(source.cache_path), source, settings) is None:
        return "not cached", ""
    try:
        load_cached_dataset(dataset.model_copy(update={"sources": (source,)}), settings)
    except DataError as error:
        return "out of date", error.message
    return "cached", ""


def _folder_size(folder: Path) -> tuple[int, int]:
    """Return how many entries a cache folder has, and their bytes."""
    if not folder.is_dir():
        return 0, 0
    entries = [p for p in folder.iterdir() if p.name.endswith((LATENTS_SUFFIX, TEXT_SUFFIX))]
    return len(entries), sum(path.stat().st_size for path in entries)
