"""The GPU that an estimate is for, and what runs on this machine have measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain.environment import gpus
from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config
from trainer.contract.errors import MenmaError, UserError
from trainer.contract.memory_model import (
    Circumstances,
    Estimate,
    Gpu,
    estimate,
    find_gpu,
    gpu_of_memory,
)
from trainer.contract.run_dir import RunDir
from trainer.contract.variants import VARIANTS

GIB = 2**30
MOST_RUNS = 20
"""Newest runs that are looked at."""
PLAUSIBLE = (0.7, 1.5)
"""Measured / estimated peaks beyond these belong to something else than what was estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU and how many of it there are."""

    gpu: Gpu
    count: int = 1
    here: bool = False
    """It is in this machine."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Measured / estimated peaks of runs on this machine."""

    factor: float = 1.0
    runs: int = 0


def choose_card(name: str | None, vram_gib: float | None) -> Card | None:
    """Return the card that was asked for, else this machine's; None: neither.

    Raises:
        UserError: no GPU of that name, or both were given.
    """
    if name is not None and vram_gib is not None:
        raise UserError("a name and a size of the GPU at once", hint="give --gpu or --vram")
    if name is not None:
        return Card(gpu=find_gpu(name))
    if vram_gib is not None:
        return Card(gpu=gpu_of_memory(vram_gib))
    found = gpus()
    if not found:
        return None
    smallest = min(found, key=lambda gpu: gpu["vram_gib"])
    gpu = gpu_of_memory(float(smallest["vram_gib"]), str(smallest["name"]))
    return Card(gpu=gpu, count=len(found), here=True)


def estimate_here(config: RunConfig, variant: str) -> Estimate | None:
    """Return the estimate for this machine's GPU; None: there is none, or the model is unknown.

    Args:
        config: checked.
        variant: what `model.variant = "auto"` was found to be.
    """
    if variant not in VARIANTS:
        return None
    card = choose_card(None, None)
    if card is None:
        return None
    model = config.model.model_copy(update={"variant": variant})
    config = config.model_copy(update={"model": model})
    return estimate(config, card.gpu, circumstances(config, card))


def circumstances(config: RunConfig, card: Card) -> Circumstances:
    """Return what is known of the machine that the card is in."""
    correction = measured_correction(config) if card.here else Correction()
    return Circumstances(
        num_gpus=card.count, correction=correction.factor, measured_runs=correction.runs
    )


def measured_correction(config: RunConfig) -> Correction:
    """Return how measured peaks of earlier runs compare with their estimates.

    Looked at are the newest runs beside the config's own that trained the same variant with the
    same `memory.weight_format`. A run's figure is the memory that torch had reserved at most
    (`peaks.json`), divided by the estimate for the run's own config without CUDA's context. The
    factor is their median.
    """
    ratios = list(_ratios(config))
    if not ratios:
        return Correction()
    return Correction(statistics.median(ratios), len(ratios))


def _ratios(config: RunConfig) -> Iterator[float]:
    files = sorted(
        config.output.runs_dir.glob("*/peaks.json"),
        key=lambda path: path.stat().st_mtime_ns,
        reverse=True,
    )
    for file in files[:MOST_RUNS]:
        run = RunDir(file.parent)
        measured = _read(file).get("peak_vram_gib")
        if not isinstance(measured, int | float) or measured <= 0:
            continue
        try:
            theirs = load_config(run.config, environ={})
            if _kind(theirs) != _kind(config):
                continue
            estimated = estimate(theirs, known=Circumstances(num_gpus=_world_size(run)))
        except MenmaError:
            continue  # a run of another version of Menma, or whose dataset file is gone
        sampled = theirs.sampling.every_steps or theirs.sampling.at_start
        phases = ["training", "sampling"] if sampled else ["training"]
        parts = max((estimated.phase(name) for name in phases), key=lambda phase: phase.peak_bytes)
        ratio = measured * GIB / (parts.peak_bytes - parts.parts["CUDA context"])
        if PLAUSIBLE[0] <= ratio <= PLAUSIBLE[1]:
            yield ratio


def _kind(config: RunConfig) -> tuple[str, str]:
    return config.model.variant, config.memory.weight_format


def _world_size(run: RunDir) -> int:
    size = _read(run.environment).get("world_size", 1)
    return size if isinstance(size, int) and size > 0 else 1


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written, or damaged: it corrects nothing
        return {}
    return content if isinstance(content, dict) else {}
