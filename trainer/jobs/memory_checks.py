"""What a config's memory settings need of this machine and of the weight files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.attention.base import AttentionNeeds, find_obstacle
from trainer.contract.catalog import ATTENTION
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, Problem
from trainer.io.mapped_load import open_weights
from trainer.jobs.build import fp8_spec, pick_device, weights_dtype
from trainer.models.wan.detect import official_tensors
from trainer.models.wan.quantised import plan_quantisation
from trainer.quant.products import fp8_products_problem

_TRANSFORMERS = ("transformer", "transformer_high_noise")


def memory_problems(config: RunConfig, *, trains: bool) -> list[Problem]:
    """Return what cannot work here; files are judged by their headers.

    Files that are missing or damaged are told elsewhere.

    Args:
        config: the run's config.
        trains: judge for training; otherwise for sampling and measuring alone.
    """
    problems = list(_fp8_files(config))
    if config.memory.fp8_matmul or config.memory.attention != "sdpa":
        try:
            device = pick_device(config)
        except ConfigError as error:
            return [*problems, Problem(error.message, "distributed.device", hint=error.hint)]
        problems += _fp8_products(config, device)
        problems += _attention(config, device, trains=trains)
    return problems


def _attention(config: RunConfig, device: torch.device, *, trains: bool) -> Iterator[Problem]:
    name = config.memory.attention
    needs: AttentionNeeds = ATTENTION.load(name).needs
    obstacle = find_obstacle(needs, device, weights_dtype(config), trains=trains)
    if obstacle is not None:
        yield Problem(f"{name}: {obstacle.message}", "memory.attention", hint=obstacle.hint)


def _fp8_products(config: RunConfig, device: torch.device) -> Iterator[Problem]:
    if not config.memory.fp8_matmul:
        return
    reason = fp8_products_problem(device)
    if reason is not None:
        hint = "set fp8_matmul = false: the weights stay fp8 and are multiplied with as bf16"
        yield Problem(reason, "memory.fp8_matmul", hint=hint)


def _fp8_files(config: RunConfig) -> Iterator[Problem]:
    spec = fp8_spec(config)
    if spec is None:
        return
    told: set[Problem] = set()
    for field in _TRANSFORMERS:
        path: Path | None = getattr(config.model, field)
        if path is None or not path.exists():
            continue
        try:
            weights = open_weights(path)
            plan_quantisation(weights, official_tensors(weights), spec)
        except ConfigError as error:
            yield from (problem for problem in error.problems if problem not in told)
            told.update(error.problems)
        except MenmaError:
            continue  # the files' own faults are told with the key of the file
