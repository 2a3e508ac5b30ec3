"""What a config's memory settings need of this machine and of the weight files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.attention.base import AttentionNeeds, find_obstacle
from trainer.contract.catalog import ATTENTION
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, MenmaError, Problem
from trainer.contract.memory_model import resolve_memory
from trainer.contract.memory_rules import too_many_blocks
from trainer.contract.sequence_rules import uneven_heads
from trainer.contract.variants import TransformerConfig
from trainer.io.mapped_load import open_weights
from trainer.jobs.build import fp8_spec, pick_device, weights_dtype
from trainer.models.wan.detect import official_tensors, recognise
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
    problems = [*_fp8_files(config), *_blocks(config), *_heads(config)]
    if config.memory.compile_blocks and (missing := compiler_problem()) is not None:
        problems.append(missing)
    if config.memory.fp8_matmul or config.memory.attention != "sdpa":
        try:
            device = pick_device(config)
        except ConfigError as error:
            return [*problems, Problem(error.message, "distributed.device", hint=error.hint)]
        problems += _fp8_products(config, device)
        problems += _attention(config, device, trains=trains)
    return problems


def memory_notes(config: RunConfig) -> Iterator[str]:
    """Yield what works here and is likely not meant."""
    memory = config.memory
    if not memory.blocks_to_swap and not memory.automatic:
        return
    try:
        device = pick_device(config)
    except ConfigError:
        return  # told as an error, or this is not the machine that trains
    if device.type == "cpu":
        if memory.automatic:
            yield resolve_memory(config, None).in_words()
        if memory.blocks_to_swap not in {0, "auto"}:
            yield (
                "memory.blocks_to_swap saves nothing here: training on the CPU, device memory is "
                "RAM, and each block is copied within it"
            )


def compiler_problem() -> Problem | None:
    """Return why blocks cannot be compiled on this machine; None where a compiler is found."""
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++", "cl") if name]
    if any(shutil.which(name) for name in names):
        return None
    return Problem(
        f"torch.compile needs a C++ compiler, and none is on the PATH ({', '.join(names)})",
        "memory.compile_blocks",
        hint="install one (Debian, Ubuntu: g++; conda: cxx-compiler), or set it to false",
    )


def _blocks(config: RunConfig) -> Iterator[Problem]:
    """Yield what the weight files say of the number of blocks to swap."""
    wanted = config.memory.blocks_to_swap
    if not wanted or wanted == "auto":
        return
    for shape in _shapes(config):
        problem = too_many_blocks(wanted, shape.num_layers)
        if problem is not None:
            yield problem
            return


def _heads(config: RunConfig) -> Iterator[Problem]:
    """Yield what the weight files say of dealing out their heads."""
    if config.distributed.sequence_parallel == 1:
        return
    for shape in _shapes(config):
        problem = uneven_heads(shape.num_heads, config.distributed.sequence_parallel)
        if problem is not None:
            yield problem
            return


def _shapes(config: RunConfig) -> Iterator[TransformerConfig]:
    for field in _TRANSFORMERS:
        path: Path | None = getattr(config.model, field)
        if path is None or not path.exists():
            continue
        try:
            yield recognise(open_weights(path), "auto", dict(config.model.shape)).config
        except MenmaError:
            continue  # the files' own faults are told with the key of the file


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
