"""The job `check`: config, weight files and dataset; everything that is wrong at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources, place_problems
from trainer.contract.config_rules import check_files
from trainer.contract.dataset_config import DatasetConfig
from trainer.contract.errors import ConfigError, Problem, UserError
from trainer.contract.experts import trains_both
from trainer.contract.hub import references
from trainer.contract.jobs import CheckRequest
from trainer.contract.optimizer_rules import optimizer_notes
from trainer.contract.prompts import read_prompts
from trainer.contract.variants import Variant
from trainer.core.seams import BuildContext
from trainer.data.cache_index import is_cached
from trainer.data.checks import DatasetCheck, check_dataset
from trainer.io.mapped_load import open_weights
from trainer.jobs.adapter_checks import adapter_problems
from trainer.jobs.base import MAX_LISTED, Emit
from trainer.jobs.build import mask_problems
from trainer.jobs.components import require_vae, settle_variant, with_variant
from trainer.jobs.config_checks import (
    batch_problems,
    encoder_problems,
    variant_problem,
    weight_problems,
)
from trainer.jobs.distributed_checks import distributed_problems
from trainer.jobs.expert_share import settle_turns
from trainer.jobs.memory_checks import memory_notes, memory_problems
from trainer.jobs.optimizer_checks import optimizer_problems
from trainer.jobs.run_items import cache_settings, holdout_of
from trainer.jobs.start import machine_problems
from trainer.models.wan.detect import recognise
from trainer.sampling.inputs import check_inputs
from trainer.sampling.requests import requests_of


def run(request: CheckRequest, emit: Emit) -> None:
    """Check all that can be checked before a run.

    Clips that cannot be used are warnings (errors when the dataset is `strict`), as they are for
    caching. The `end` event holds the bucket table.

    Raises:
        ConfigError: with every problem at once.
    """
    loaded = load_config_with_sources(request.config, request.set, jobs=["cache", "train"])
    config = loaded.config
    problems = [
        *_file_problems(config),
        *weight_problems(config),
        *machine_problems(config),
        *distributed_problems(config),
        *optimizer_problems(config),
    ]
    shares: dict[str, object] = {}
    variant = _variant(config, problems)
    if variant is not None:
        problems += _file_problems(with_variant(config, variant))
        told = {problem.key for problem in problems}
        more = (
            *_kind_problems(config, variant),
            *encoder_problems(config),
            *_prompt_problems(config, variant),
        )
        problems += [problem for problem in more if problem.key not in told]
        problems += memory_problems(config, trains=True)
        shares = _expert_shares(config, variant, problems, emit)
        problems += adapter_problems(config)
        problems = list(dict.fromkeys(problems))
    for note in (*memory_notes(config), *optimizer_notes(config)):
        emit("warning", message=note)
    for field, file in references(config).items():
        emit("log", message=f"model.{field}: {file} is downloaded when it is needed")
    summary = _dataset(config, variant, problems, emit)
    if problems:
        raise ConfigError(problems=place_problems(problems, loaded.sources))
    emit("end", reason="done", variant=variant.name if variant else "", **summary, **shares)


def _file_problems(config: RunConfig) -> list[Problem]:
    return list(dict.fromkeys(check_files(config, "cache") + check_files(config, "train")))


def _prompt_problems(config: RunConfig, variant: Variant) -> list[Problem]:
    """Return what this variant cannot make of the prompts, and what is wrong with their file."""
    file = config.sampling.prompts_file
    if file is not None and not file.exists():
        return []  # told with the other files
    try:
        prompts = config.sampling.prompts if file is None else read_prompts(file)
    except ConfigError as error:
        return list(error.problems)
    try:
        requests = requests_of(prompts, variant, config.sampling)
        check_inputs(requests, multiple=variant.pixel_multiple)
    except ConfigError as error:
        section = "sampling." if file is None else ""
        return [replace(p, key=f"{section}{p.key}", file=file) for p in error.problems]
    return []


def _expert_shares(
    config: RunConfig, variant: Variant, problems: list[Problem], emit: Emit
) -> dict[str, object]:
    """Say what share of the steps each expert gets, where both are trained."""
    if not trains_both(config) or not variant.experts:
        return {}
    steps = config.training.max_steps if config.training.epochs is None else 0
    build = BuildContext(
        variant=variant, seed=config.training.seed, device=torch.device("cpu"), total_steps=steps
    )
    try:
        turns = settle_turns(config, build)
    except ConfigError as error:
        problems += error.problems
        return {}
    emit("log", message=f"experts: {turns.in_words(steps)}")
    return {
        "experts": {
            "high_noise_share": round(turns.high_noise_share, 6),
            "steps_per_turn": turns.steps_per_turn,
            "boundary": variant.expert_boundary,
        }
    }


def _kind_problems(config: RunConfig, variant: Variant) -> list[Problem]:
    """Return which files are not what this variant works with; its own transformer is known."""
    problems = []
    for field in ("vae", "transformer", "transformer_high_noise"):
        path: Path | None = getattr(config.model, field)
        if path is None or not path.exists() or (field != "vae" and not variant.experts):
            continue
        try:
            weights = open_weights(path)
            if field == "vae":
                require_vae(weights, variant)
            else:
                recognise(weights, variant.name, dict(config.model.shape))
        except UserError as error:
            problems.append(Problem(error.message, f"model.{field}", hint=error.hint))
    return problems


def _variant(config: RunConfig, problems: list[Problem]) -> Variant | None:
    if any(problem.key.startswith("model.transformer") for problem in problems):
        return None
    problem = variant_problem(config)
    if problem is not None:
        problems.append(problem)
        return None
    return settle_variant(config)


def _dataset(
    config: RunConfig, variant: Variant | None, problems: list[Problem], emit: Emit
) -> dict[str, object]:
    told = ("dataset", "validation.sources")
    if variant is None or any(problem.key.startswith(told) for problem in problems):
        return {}
    try:
        dataset = config.load_all_sources()
    except ConfigError as error:
        problems += error.problems
        return {}
    section = config.validation
    validates = bool(section.split or section.sources)
    checked = check_dataset(dataset, variant, holdout=holdout_of(config) if validates else None)
    for note in checked.notes:
        emit("log", message=note)
    if dataset.general.strict:
        problems += checked.problems
    else:
        for problem in checked.problems:
            emit("warning", message=str(problem), file=str(problem.file or ""), hint=problem.hint)
    if len(checked.buckets) > MAX_LISTED:
        total = len(checked.buckets)
        emit("log", message=f"the largest {MAX_LISTED} of {total} buckets are listed")
    problems += _empty_sides(config, checked)
    problems += batch_problems(config, checked.groups)
    problems += mask_problems(config, masks=checked.masked_clips > 0) if checked.clips else []
    for note in _dataset_notes(config, variant, dataset, checked):
        emit("warning", message=note)
    return {
        "clips": checked.clips,
        "validation_clips": checked.validation_clips,
        "validation_items": checked.validation_items,
        "batches_per_epoch": checked.batches_per_epoch,
        "num_problems": len(checked.problems),
        "num_buckets": len(checked.buckets),
        "buckets": [
            {"bucket": str(row.bucket), "items": row.items, "tokens": row.tokens}
            for row in checked.buckets[:MAX_LISTED]
        ],
    }


def _empty_sides(config: RunConfig, checked: DatasetCheck) -> list[Problem]:
    """Return what is left without a clip: training, or the validation that is wanted."""
    section = config.validation
    if not checked.clips and checked.validation_clips and section.split:
        return [
            Problem(
                "holds out the only clip of the dataset",
                "validation.split",
                hint="add other clips, or name those to validate on in validation.sources",
            )
        ]
    problems = []
    if not checked.clips:
        problems.append(Problem("no clip of the dataset can be used", "dataset"))
    if section.sources and not checked.validation_clips:
        problems.append(Problem("no clip of them can be used", "validation.sources"))
    return problems


def _dataset_notes(
    config: RunConfig, variant: Variant, dataset: DatasetConfig, checked: DatasetCheck
) -> Iterator[str]:
    """Yield what is likely not meant."""
    if checked.shared_clips:
        yield (
            f"{checked.shared_clips} clips of validation.sources are training clips, too: the "
            "validation loss will look better than it is"
        )
    yield from _uncached(config, variant, dataset)


def _uncached(config: RunConfig, variant: Variant, dataset: DatasetConfig) -> Iterator[str]:
    """Yield the sources that `menma train` will call not cached yet, where others are."""
    try:
        settings = cache_settings(config, variant)
    except UserError:
        return  # told with the weight files
    first = holdout_of(config).first_source
    cached = [is_cached(source, settings) for source in dataset.sources]
    if not any(cached[:first]):
        return  # nothing is cached, which is no surprise
    for index, source in enumerate(dataset.sources):
        if not cached[index]:
            name = f"validation.sources[{index - first}]" if index >= first else source.media_path
            yield f"{name} is not cached yet: run `menma cache` again"
