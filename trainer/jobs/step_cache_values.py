"""Where a job finds what step caches need to know of its model, and where it writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.denoising_options import DenoisingOptions
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.variants import VARIANTS, Expert, Variant
from trainer.data.fingerprint import digest, model_identity
from trainer.io.mapped_load import open_weights
from trainer.models.wan.detect import recognise
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.choice import step_cache_of
from trainer.sampling.step_cache.recorder import Recorder
from trainer.sampling.step_cache.values import (
    Calibration,
    StepCacheValues,
    read_calibration,
    write_calibration,
)

SUFFIX = ".step_cache.json"


def step_cache_values(
    config: RunConfig,
    variant: Variant,
    files: Callable[[], Mapping[Expert, Path]],
    requests: Sequence[SampleRequest],
) -> StepCacheValues:
    """Return what is known of the transformers, enough for all requests.

    A calibration is taken from `sampling.step_cache_file`, else from beside the low-noise weights
    (`<name>.step_cache.json`), else from the user's cache folder; the last two only if it is of
    the same weights. Nothing is read where no request has a step cache.

    Args:
        config: may name a calibration.
        variant: the model.
        files: gives the transformers' weights.
        requests: what shall be sampled.

    Raises:
        ConfigError: too little is known, or the file is no calibration of this variant.
        ModelFileError: the weights cannot be read.
    """
    if all(request.denoising.step_cache == "none" for request in requests):
        return StepCacheValues()
    known = known_values(config, variant, files())
    for request in requests:
        step_cache_of(request, variant, known)
    return known


def known_values(
    config: RunConfig, variant: Variant, files: Mapping[Expert, Path]
) -> StepCacheValues:
    """Return what is known of the transformers in `files`, for requests that come later.

    Raises:
        ConfigError: the file that is named is no calibration of this variant.
        ModelFileError: the weights cannot be read.
    """
    return StepCacheValues(
        measured=_measured(config, variant, files),
        published=all(_is_released(config, variant, path) for path in files.values()),
    )


def requests_to_calibrate(requests: Sequence[SampleRequest]) -> tuple[SampleRequest, ...]:
    """Return the requests without methods and caches, of which a calibration is made.

    Raises:
        ConfigError: they do not walk the same steps.
    """
    walks = {
        (one.num_steps, one.flow_shift, one.solver, one.schedule, one.strength) for one in requests
    }
    if len(walks) > 1:
        raise ConfigError(
            "the prompts of a calibration walk different steps",
            hint="give all of them the same num_steps, flow_shift, solver, schedule and strength",
        )
    return tuple(replace(request, denoising=DenoisingOptions()) for request in requests)


def write_measured(
    recorder: Recorder,
    requests: Sequence[SampleRequest],
    config: RunConfig,
    variant: Variant,
    files: Mapping[Expert, Path],
) -> Path:
    """Write what was measured, and return where: `sampling.step_cache_file`, or the cache folder.

    Raises:
        ConfigError: there were too few steps.
        DiskError: it cannot be written.
    """
    models = _identities(files)
    calibration = Calibration(
        variant=variant.name,
        models=models,
        num_steps=requests[0].num_steps,
        flow_shift=requests[0].flow_shift,
        num_prompts=len(requests),
        experts=recorder.values(),
    )
    path = config.sampling.step_cache_file or _cached(models)
    write_calibration(calibration, path)
    return path


def _measured(
    config: RunConfig, variant: Variant, files: Mapping[Expert, Path]
) -> Calibration | None:
    given = config.sampling.step_cache_file
    if given is not None:
        calibration = read_calibration(given)
        if calibration.variant != variant.name:
            message = f"{given} was measured on {calibration.variant}, and this is {variant.name}"
            hint = "measure this model: menma sample --calibrate CONFIG"
            raise ConfigError(problems=[Problem(message, "sampling.step_cache_file", hint=hint)])
        return calibration
    models = _identities(files)
    weights = files["low_noise"]
    for path in (weights.with_name(weights.stem + SUFFIX), _cached(models)):
        if path.is_file():
            calibration = read_calibration(path)
            if calibration.models == models and calibration.variant == variant.name:
                return calibration
    return None


def _identities(files: Mapping[Expert, Path]) -> dict[Expert, str]:
    return {expert: model_identity(path) for expert, path in files.items()}


def _cached(models: Mapping[Expert, str]) -> Path:
    """Return where the calibration of these weights is kept for the user."""
    if os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "menma" / "step_cache" / f"{digest(dict(models))}.json"


def _is_released(config: RunConfig, variant: Variant, path: Path) -> bool:
    """Tell whether weights have the shape of the released variant, and not of a smaller one."""
    found = recognise(open_weights(path), variant.name, dict(config.model.shape))
    return found.config == VARIANTS[variant.name].transformer
