"""Which settings make a config fit a card, and which of those are fastest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.memory_model.automatic import resolve_memory
from trainer.contract.memory_model.estimating import Circumstances, estimate_resolved, with_jobs
from trainer.contract.memory_model.gpus import GIB, Gpu
from trainer.contract.memory_model.result import PHASES, Estimate
from trainer.contract.memory_model.search import (
    LOSSY,
    Choice,
    Judge,
    Settings,
    best_choice,
    fewest_swapped,
    paced,
    with_settings,
)
from trainer.contract.memory_model.workload import workload_of

_PLACES = (
    (2, "none", "none"),
    (3, "none", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
)
"""ZeRO stage, place of the optimizer's state, place of the weights; from the GPU to RAM."""
_TILES = (None, 1024, 512, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that differs from the config, in the order in which they are made."""

    key: str
    value: Any
    peak_bytes: int
    """Highest peak once it is made."""
    step_seconds: float | None
    host_bytes: int
    """Host memory of all processes of a machine once it is made."""
    exact: bool
    """The numbers stay those of the config."""

    @property
    def override(self) -> str:
        """What to give to `--set`."""
        return f"{self.key}={json.dumps(self.value)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What the search found."""

    before: Estimate
    after: Estimate
    """With all changes; the smallest that there is where nothing fits."""
    changes: tuple[Change, ...]
    phases: tuple[str, ...] = PHASES
    """Those that have to fit."""

    @property
    def found(self) -> bool:
        """Whether it fits now, margin included."""
        return self.after.only(*self.phases).verdict == "fits"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; memory in GiB."""
        return {
            "found": self.found,
            "changes": [
                {
                    "set": change.override,
                    "peak_gib": round(change.peak_bytes / GIB, 3),
                    "step_seconds": change.step_seconds,
                    "host_gib": round(change.host_bytes / GIB, 3),
                    "exact": change.exact,
                }
                for change in self.changes
            ],
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }


def find_fit(config: RunConfig, gpu: Gpu, known: Circumstances | None = None) -> Fit:
    """Search the settings with which `config` fits `gpu` and is fastest.

    Faster settings are tried as well as smaller ones. Settings that change what is computed (fp8
    weights) are taken only where the exact ones do not fit, or take clearly longer.

    `auto` is resolved first, so that changes are told from what it becomes.

    Args:
        config: checked.
        gpu: the card.
        known: as in `estimate`.
    """
    config = resolve_memory(config, gpu, known).config

    def judge(settings: Settings) -> Estimate:
        return estimate_resolved(with_settings(config, settings), paced(gpu), known)

    def judge_training(settings: Settings) -> Estimate:
        return judge(settings).only("training")  # the other phases know other settings

    choices = [Choice(one, judge_training(one)) for one in ({}, *_alternatives(config))]
    best = fewest_swapped(best_choice(choices), judge_training)
    before = with_jobs(estimate_resolved(config, gpu, known), config, known)
    phases = _phases(config)
    settings = {**best.settings, **_tiles(config, best.settings, judge, phases)}
    changes, made = [], {}
    for key, value in settings.items():
        made[key] = value
        step = judge(made)
        changes.append(
            Change(
                key=key,
                value=value,
                peak_bytes=step.peak_bytes,
                step_seconds=step.step_seconds if gpu.bf16_tflops else None,
                host_bytes=step.host_bytes,
                exact=key not in LOSSY,
            )
        )
    fitted = with_settings(config, settings)
    after = with_jobs(estimate_resolved(fitted, gpu, known), fitted, known)
    return Fit(before=before, after=after, changes=tuple(changes), phases=phases)


def _phases(config: RunConfig) -> tuple[str, ...]:
    """Return what has to fit; a whole model can be sampled where it was not trained."""
    sampling = config.sampling
    if config.adapter.kind != "none" or sampling.while_training:
        return PHASES
    return tuple(phase for phase in PHASES if phase != "sampling")


def _alternatives(config: RunConfig) -> Iterator[Settings]:
    """Yield settings that keep the rules; values that are the config's own are left out."""
    memory = config.memory
    checkpointing = dict.fromkeys((memory.gradient_checkpointing, True, 2, False))
    dimensions: list[list[Settings]] = [
        [{"memory.gradient_checkpointing": value} for value in checkpointing],
        [{"memory.keep_attention": value} for value in (False, True)],
        [{"memory.weight_format": value} for value in _formats(config)],
        [{"memory.blocks_to_swap": value} for value in _swaps(config)],
        [{"memory.offload_checkpoints": value} for value in (False, True)],
        [
            {"memory.feed_forward_chunks": wide, "memory.attention_chunks": narrow}
            for wide, narrow in _chunks(config)
        ],
        list(_batches(config)),
        list(_offloads(config)),
    ]
    for parts in product(*dimensions):
        wanted = {key: value for part in parts for key, value in part.items()}
        settings = {key: value for key, value in wanted.items() if value != _value(config, key)}
        if memory.fp8_matmul and wanted["memory.weight_format"] != memory.weight_format:
            continue
        if settings and not check_rules(with_settings(config, settings)):
            yield settings


def _formats(config: RunConfig) -> tuple[str, ...]:
    own = config.memory.weight_format
    return (own, "fp8_scaled") if own == "bf16" and config.adapter.kind != "none" else (own,)


def _swaps(config: RunConfig) -> tuple[int, ...]:
    """Return numbers of blocks to swap; between two of them `fewest_swapped` looks closer."""
    own = config.memory.swapped_blocks
    if config.adapter.kind == "none":
        return (own,)
    blocks = workload_of(config).shape.num_layers
    return tuple(sorted({own, *(blocks * quarter // 4 for quarter in range(5))}))


def _chunks(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """Return numbers of parts of feed-forward and attention; the wider goes first."""
    own = (config.memory.feed_forward_chunks, config.memory.attention_chunks)
    return tuple(sorted({own, (1, 1), (4, 1), (4, 4)}))


def _offloads(config: RunConfig) -> Iterator[Settings]:
    """Yield where a full fine-tune may keep its state; `auto` engines are DeepSpeed here."""
    yield {}
    distributed = config.distributed
    if config.adapter.kind != "none" or distributed.engine == "local":
        return
    for stage, optimizer, parameters in _PLACES:
        wanted = {
            "distributed.zero_stage": stage,
            "distributed.offload_optimizer": optimizer,
            "distributed.offload_parameters": parameters,
        }
        changed = {key: value for key, value in wanted.items() if value != _value(config, key)}
        if changed:
            yield changed


def _batches(config: RunConfig) -> Iterator[Settings]:
    """Yield smaller batches, and as many more microbatches, where `--set` can say so."""
    yield {}
    dataset = config.dataset
    inherited = all("batch_size" not in source for source in dataset.sources)
    batch = dataset.general.get("batch_size", 1)
    if dataset.file is not None or not inherited or not isinstance(batch, int):
        return
    accumulation = config.training.gradient_accumulation_steps
    factor = 2
    while batch % factor == 0:
        yield {
            "dataset.general.batch_size": batch // factor,
            "training.gradient_accumulation_steps": accumulation * factor,
        }
        factor *= 2


def _tiles(
    config: RunConfig, settings: Settings, judge: Judge, phases: tuple[str, ...]
) -> Settings:
    """Return the largest VAE tile with which encoding and decoding fit, if it must be changed."""
    own = config.memory.vae_tile
    smallest: Settings = {}
    for tile in (own, *(t for t in _TILES if t is not None and t < (own or 1 << 30))):
        smallest = {} if tile == own else {"memory.vae_tile": tile}
        result: Estimate = judge({**settings, **smallest})
        assert result.gpu is not None
        share = 1 + result.margin_bytes / max(result.peak_bytes, 1)
        tiled = [name for name in ("latents", "sampling") if name in phases]
        worst = max(result.phase(name).peak_bytes for name in tiled)
        if worst * share <= result.gpu.memory_bytes:
            return smallest
    return smallest


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    if section == "dataset":
        return config.dataset.general.get("batch_size", 1)
    return getattr(getattr(config, section), name)
