"""What runs on this machine have measured, against what the estimate said of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError
from trainer.contract.memory_model.estimating import Circumstances, estimate_resolved
from trainer.contract.memory_model.gpus import GIB
from trainer.contract.memory_model.workload import variant_of
from trainer.contract.run_dir import RunDir

MOST_RUNS = 20
"""Newest runs that are looked at."""
PLAUSIBLE = (0.7, 1.5)
"""Measured / estimated peaks beyond these belong to something else than what was estimated."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Measured / estimated peaks of runs on this machine."""

    factor: float = 1.0
    runs: int = 0


def measured_correction(config: RunConfig) -> Correction:
    """Return how measured peaks of earlier runs compare with their estimates.

    Looked at are the newest runs in the config's `output.runs_dir` that trained the same variant
    with the same `memory.weight_format`. A run's figure is the memory that torch had reserved at
    most (`peaks.json`), divided by the estimate for the run's own config without CUDA's context;
    what was `auto` in it counts as what it became (`environment.json`). The factor is their median.
    """
    try:
        kind = _kind(config)
    except ConfigError:  # the estimate says so
        return Correction()
    ratios = list(_ratios(config.output.runs_dir, kind))
    if not ratios:
        return Correction()
    return Correction(statistics.median(ratios), len(ratios))


def _ratios(runs_dir: Path, kind: tuple[str, str]) -> Iterator[float]:
    from trainer.contract.config_io import load_config  # reads what this module is part of

    files = sorted(
        runs_dir.glob("*/peaks.json"),
        key=lambda path: path.stat().st_mtime_ns,
        reverse=True,
    )
    for file in files[:MOST_RUNS]:
        run = RunDir(file.parent)
        measured = _read(file).get("peak_vram_gib")
        if not isinstance(measured, int | float) or measured <= 0:
            continue
        environment = _read(run.environment)
        try:
            theirs = _as_it_ran(load_config(run.config, environ={}), environment)
            if theirs is None or _kind(theirs) != kind:
                continue
            known = Circumstances(num_gpus=_world_size(environment))
            estimated = estimate_resolved(theirs, None, known)
        except MenmaError:
            continue  # a run of another version of Menma, or whose dataset file is gone
        sampled = theirs.sampling.while_training
        phases = ["training", "sampling"] if sampled else ["training"]
        parts = max((estimated.phase(name) for name in phases), key=lambda phase: phase.peak_bytes)
        ratio = measured * GIB / (parts.peak_bytes - parts.parts["CUDA context"])
        if PLAUSIBLE[0] <= ratio <= PLAUSIBLE[1]:
            yield ratio


def _as_it_ran(config: RunConfig, environment: dict[str, Any]) -> RunConfig | None:
    """Return the config with what `auto` became in that run; None: nothing tells it."""
    fields = config.memory.automatic
    told = environment.get("memory")
    became = told if isinstance(told, dict) else {}
    if any(not isinstance(became.get(field), int) for field in fields):
        return None
    memory = config.memory.model_copy(update={field: became[field] for field in fields})
    return config.model_copy(update={"memory": memory})


def _kind(config: RunConfig) -> tuple[str, str]:
    return variant_of(config).name, config.memory.weight_format


def _world_size(environment: dict[str, Any]) -> int:
    size = environment.get("world_size", 1)
    return size if isinstance(size, int) and size > 0 else 1


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written, or damaged: it corrects nothing
        return {}
    return content if isinstance(content, dict) else {}
