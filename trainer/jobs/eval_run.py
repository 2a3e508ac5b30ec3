"""The job `eval`: from a run, or a config, to its figures."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.adapters import load_adapter
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.experts import single_expert, trained_experts
from trainer.contract.jobs import EvalRequest
from trainer.contract.memory_model import Clip
from trainer.contract.memory_model.denoising import WorkingSet
from trainer.contract.run_dir import RunDir
from trainer.contract.validation_config import ValidationSection
from trainer.contract.variants import Expert, Variant
from trainer.core.seams import BuildContext, Probe
from trainer.io.mapped_load import open_weights
from trainer.jobs.automatic_memory import resolve_for_forwards, working_set_of
from trainer.jobs.base import Emit
from trainer.jobs.build import build_plugin, freeze, load_base, pick_device
from trainer.jobs.cache_run import progress_events
from trainer.jobs.components import lazy_text_encoder, lazy_vae, settle_variant
from trainer.jobs.config_job import read_config
from trainer.jobs.eval import (
    EvalParts,
    Measured,
    Trained,
    ValidationSet,
    measure,
    shot_requests,
    shots_fingerprint,
    write_videos,
)
from trainer.jobs.run_facts import training_facts
from trainer.jobs.run_items import load_run_items, validation_settings
from trainer.jobs.sample import SampleLoaders
from trainer.jobs.sample_run import newest_outputs, transformer_files
from trainer.jobs.step_cache_values import step_cache_values
from trainer.sampling.requests import SampleRequest
from trainer.training.reporter import peaks_gib
from trainer.training.validation import ValidationResult


def run(request: EvalRequest, emit: Emit) -> None:
    """Evaluate; the `end` event holds the figures (docs/eval.md).

    Raises:
        MenmaError: the config, its files or caches, or the run do not do.
    """
    started = time.monotonic()
    config = read_config(request, "eval")
    variant = settle_variant(config)
    device = pick_device(config)
    notes: list[str] = []
    trained, run_dir = _trained(request, config, notes)
    validation = _validation_set(request, config, variant, run_dir, notes)
    build = BuildContext(variant=variant, seed=config.training.seed, device=device, total_steps=0)
    probe: Probe = build_plugin(config.probe, "kind", build, where="probe")
    shots = shot_requests(probe.shots(), variant, config.sampling, probe=config.probe.kind)
    if forwards := _forwards(config, variant, validation, shots):
        config = resolve_for_forwards(config, variant, device, forwards, emit)
    tile = config.memory.vae_tile
    files = partial(transformer_files, config, variant)
    measured = measure(
        EvalParts(
            variant=variant,
            trained=trained,
            experts=trained_experts(config) or ("low_noise",),
            loaders=_loaders(config, variant, device, samples=bool(shots)),
            load_trained=lambda path: _load(config, path, single_expert(config), device),
            validation=validation,
            shots=shots,
            device=device,
            tile=(tile, tile) if tile else None,
            progress=progress_events(emit),
            step_cache=step_cache_values(config, variant, files, shots),
        )
    )
    figures = probe.judge(measured.videos) if shots else {}
    if request.save is not None:
        write_videos(request.save, shots, measured.videos)
    emit(
        "end",
        reason="done",
        name=config.name,
        config=str(request.config),
        run=None if run_dir is None else str(run_dir.root),
        variant=variant.name,
        expert=config.model.expert,
        **_trained_fields(config, trained, run_dir),
        validation=_validation_fields(validation, measured),
        probe=None
        if not shots
        else {
            "kind": config.probe.kind,
            "shots": len(shots),
            "fingerprint": shots_fingerprint(shots),
            "figures": dict(figures),
            "videos": None if request.save is None else str(request.save),
        },
        evaluation={"seconds": round(time.monotonic() - started, 3), **_peaks(peaks_gib(device))},
        notes=notes,
    )


def _forwards(
    config: RunConfig,
    variant: Variant,
    validation: ValidationSet | None,
    shots: Sequence[SampleRequest],
) -> list[WorkingSet]:
    """Return all that the transformer works on; empty: it is not loaded."""
    buckets = {item.bucket for item in validation.items} if validation is not None else set()
    batch = config.validation.batch_size
    measured = [
        Clip(width=one.width, height=one.height, num_frames=one.num_frames, batch=batch)
        for one in sorted(buckets)
    ]
    return [
        *(WorkingSet(clip=clip) for clip in measured),
        *(working_set_of(request, variant) for request in shots),
    ]


def _trained(
    request: EvalRequest, config: RunConfig, notes: list[str]
) -> tuple[tuple[Trained, ...], RunDir | None]:
    """Return the newest output of the run that is meant, for each transformer, and that run.

    Raises:
        ConfigError: a run is given, and has no output yet.
    """
    run_dir = RunDir(request.run_dir or config.run_dir)
    newest = newest_outputs(run_dir, config)
    if not newest:
        if request.run_dir is not None:
            raise ConfigError(
                f"{request.run_dir} has no output file yet",
                hint="wait for its first one; `menma eval` on the config measures the base alone",
            )
        notes.append(f"the base alone: there is no output of a run in {run_dir.root}")
        return (), None
    everywhere = trained_experts(config) or ("low_noise",)
    trained = [
        Trained(path=path, expert=expert, is_model=config.adapter.kind == "none")
        for wanted, path in newest.items()
        for expert in (everywhere if wanted is None else (wanted,))
    ]
    return tuple(trained), run_dir


def _validation_set(
    request: EvalRequest,
    config: RunConfig,
    variant: Variant,
    run_dir: RunDir | None,
    notes: list[str],
) -> ValidationSet | None:
    section = config.validation
    if not section.split and not section.sources:
        notes.append(
            "no validation loss: the config holds out no clips "
            "(validation.split, or [[validation.sources]])"
        )
        return None
    settings = validation_settings(config, variant)
    if not settings.timesteps:
        raise ConfigError(
            f"the {config.model.expert} expert works at none of validation.timesteps",
            hint=f"its boundary is at timestep {1000 * variant.expert_boundary:g}",
        )
    items = load_run_items(config, variant, str(request.config))
    if items.shared_clips:
        notes.append(f"{items.shared_clips} clips of validation.sources are also training clips")
    if run_dir is not None and not _held_out(section, run_dir):
        notes.append(
            "the run held out other clips when it trained: those measured here may be among the "
            "ones that it has learned"
        )
    return ValidationSet(items=items.validation, settings=settings)


def _held_out(section: ValidationSection, run_dir: RunDir) -> bool:
    """Tell whether the run has not trained on the clips that `section` splits off."""
    if not section.split:
        return True  # they have sources of their own
    try:
        content = tomllib.loads(run_dir.config.read_text(encoding="utf-8"))
        trained_with = ValidationSection.model_validate(content.get("validation", {}))
    except (OSError, ValueError):
        return False  # nothing says that it has held out any
    # A smaller share of the same seed is part of the larger one.
    return trained_with.seed == section.seed and trained_with.split >= section.split


def _loaders(
    config: RunConfig, variant: Variant, device: torch.device, *, samples: bool
) -> SampleLoaders:
    """Return how to get the models; the encoders' files are looked at only when there is a need."""
    model = config.model
    files: dict[Expert, Path | None] = {
        "low_noise": model.transformer,
        "high_noise": model.transformer_high_noise,
    }
    wanted: tuple[Expert, ...] = ("low_noise", "high_noise")
    if not (samples and variant.experts):
        wanted = trained_experts(config) or ("low_noise",)
    for expert in wanted:
        if files[expert] is None:
            field = "transformer" if expert == "low_noise" else "transformer_high_noise"
            raise ConfigError(
                f"evaluating {variant.name} needs model.{field}", hint="set it in the config"
            )

    def transformer(expert: Expert) -> nn.Module:
        path = files[expert]
        assert path is not None, "checked above"
        return _load(config, path, expert, device)

    vae = lazy_vae(config, variant, device).load if samples else _not_needed
    text_encoder = lazy_text_encoder(config, device).load if samples else _not_needed
    return SampleLoaders(text_encoder=text_encoder, transformer=transformer, vae=vae)


def _not_needed() -> Any:
    raise AssertionError("an encoder is loaded, though no video is made")


def _load(config: RunConfig, path: Path, expert: Expert | None, device: torch.device) -> nn.Module:
    return freeze(load_base(config, path, expert=expert, device=device))


def _trained_fields(
    config: RunConfig, trained: Sequence[Trained], run_dir: RunDir | None
) -> dict[str, Any]:
    """Return what is known of the trained files and of their training."""
    if not trained or run_dir is None:
        return {"output": None, "step": None, "adapter": None, "training": None}
    files = {one.path: one for one in trained}  # one that is shared counts once
    # Of two experts each file counts its own steps.
    steps = [open_weights(path).metadata.get("ss_steps", "") for path in files]
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    facts = training_facts(run_dir, newest)
    paths = [str(path) for path in files]
    return {
        "output": paths[0] if len(paths) == 1 else paths,
        "step": sum(map(int, steps)) if all(step.isdecimal() for step in steps) else None,
        "adapter": {
            "kind": config.adapter.kind,
            "parameters": sum(map(_num_parameters, files.values())),
            "bytes": sum(path.stat().st_size for path in files),
        },
        "training": {
            "seconds": facts.seconds,
            "peak_vram_gib": facts.peak_vram_gib,
            "peak_rss_gib": facts.peak_rss_gib,
        },
    }


def _num_parameters(trained: Trained) -> int:
    if trained.is_model:
        return sum(prod(tensor.shape) for tensor in open_weights(trained.path).values())
    adapter = load_adapter(trained.path, expert=trained.expert, differences=True)
    return adapter.num_parameters


def _validation_fields(
    validation: ValidationSet | None, measured: Measured
) -> dict[str, Any] | None:
    if validation is None or measured.base is None:
        return None
    return {
        "items": measured.base.num_items,
        "fingerprint": validation.fingerprint,
        "base": _loss_fields(measured.base),
        "trained": None if measured.trained is None else _loss_fields(measured.trained),
    }


def _loss_fields(result: ValidationResult) -> dict[str, Any]:
    by_timestep = {f"{timestep:g}": loss for timestep, loss in result.by_timestep.items()}
    return {"loss": result.loss, "by_timestep": by_timestep}


def _peaks(peaks: Mapping[str, float]) -> dict[str, float | None]:
    return {key: peaks.get(key) for key in ("peak_vram_gib", "peak_rss_gib")}
