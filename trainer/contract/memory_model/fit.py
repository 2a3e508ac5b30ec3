"""Which settings make a config fit a card, and which of those are fastest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.memory_model.estimating import Circumstances, estimate
from trainer.contract.memory_model.gpus import GIB, GPUS, Gpu
from trainer.contract.memory_model.result import Estimate
from trainer.contract.memory_model.workload import workload_of

LOSSY_GAIN = 0.9
"""Settings that change the numbers are taken where they need less than this share of the time."""
_PACE = GPUS["RTX 4090"]
"""Orders settings by time on a card whose arithmetic is not known."""
_TILES = (None, 1024, 512, 256)

Settings = Mapping[str, Any]
"""Key of the config -> value."""
Judge = Callable[[Settings], Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that differs from the config, in the order in which they are made."""

    key: str
    value: Any
    peak_bytes: int
    """Highest peak once it is made."""
    step_seconds: float | None
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

    @property
    def found(self) -> bool:
        """Whether it fits now, margin included."""
        return self.after.verdict == "fits"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; memory in GiB."""
        return {
            "found": self.found,
            "changes": [
                {
                    "set": change.override,
                    "peak_gib": round(change.peak_bytes / GIB, 3),
                    "step_seconds": change.step_seconds,
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

    Args:
        config: checked.
        gpu: the card.
        known: as in `estimate`.
    """

    def judge(settings: Settings) -> Estimate:
        card = gpu if gpu.bf16_tflops else replace(_PACE, name=gpu.name, memory_gib=gpu.memory_gib)
        return estimate(with_settings(config, settings), card, known)

    before = judge({})
    choices = [_Choice(settings, judge(settings)) for settings in _alternatives(config) if settings]
    best = _best([_Choice({}, before), *choices])
    best = _fewest_swapped(best, judge)
    settings = {**best.settings, **_tiles(config, best.settings, judge)}
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
                exact=key not in _LOSSY,
            )
        )
    return Fit(before=before, after=judge(settings), changes=tuple(changes))


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """Return the config with some values changed, not checked."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    update: dict[str, Any] = {}
    for section, values in sections.items():
        old = getattr(config, section)
        if section == "dataset":  # only its general batch size
            general = {**old.general, "batch_size": values["general.batch_size"]}
            update[section] = old.model_copy(update={"general": general})
        else:
            update[section] = old.model_copy(update=values)
    return config.model_copy(update=update)


_LOSSY = {"memory.weight_format", "memory.fp8_matmul"}


@dataclass(frozen=True, slots=True)
class _Choice:
    settings: Settings
    result: Estimate

    @property
    def exact(self) -> bool:
        return not self.settings.keys() & _LOSSY

    @property
    def training_bytes(self) -> int:
        return self.result.phase("training").peak_bytes

    @property
    def seconds(self) -> float:
        return self.result.step_seconds or 0.0

    def fits(self) -> bool:
        """Whether training fits, margin included; the other phases know other settings."""
        gpu = self.result.gpu
        assert gpu is not None
        share = 1 + self.result.margin_bytes / max(self.result.peak_bytes, 1)
        return self.training_bytes * share <= gpu.memory_bytes


def _best(choices: list[_Choice]) -> _Choice:
    fitting = [choice for choice in choices if choice.fits()]
    if not fitting:
        return min(choices, key=lambda one: (one.training_bytes, len(one.settings)))

    def order(choice: _Choice) -> tuple[float, int]:
        seconds = choice.seconds if choice.exact else choice.seconds / LOSSY_GAIN
        return seconds, len(choice.settings)

    return min(fitting, key=order)


def _fewest_swapped(best: _Choice, judge: Judge) -> _Choice:
    """Return the same with no more blocks swapped than it takes to fit."""
    key = "memory.blocks_to_swap"
    most = best.settings.get(key, 0)
    if not best.fits():
        return best
    least = 0
    while most - least > 1:
        number = (least + most) // 2
        settings = {**best.settings, key: number}
        fewer = _Choice(settings, judge(settings))
        if fewer.fits():
            best, most = fewer, number
        else:
            least = number
    return best


def _alternatives(config: RunConfig) -> Iterator[Settings]:
    """Yield settings that keep the rules; values that are the config's own are left out."""
    memory = config.memory
    dimensions: list[list[Settings]] = [
        [{"memory.gradient_checkpointing": value} for value in (True, 2, False)],
        [{"memory.keep_attention": value} for value in (False, True)],
        [{"memory.weight_format": value} for value in _formats(config)],
        [{"memory.blocks_to_swap": value} for value in _swaps(config)],
        [{"memory.offload_checkpoints": value} for value in (False, True)],
        [{"memory.feed_forward_chunks": value} for value in _chunks(config)],
        list(_batches(config)),
    ]
    for parts in product(*dimensions):
        wanted = {key: value for part in parts for key, value in part.items()}
        settings = {key: value for key, value in wanted.items() if value != _value(config, key)}
        if memory.fp8_matmul and wanted["memory.weight_format"] != memory.weight_format:
            continue
        if not check_rules(with_settings(config, settings)):
            yield settings


def _formats(config: RunConfig) -> tuple[str, ...]:
    own = config.memory.weight_format
    return (own, "fp8_scaled") if own == "bf16" and config.adapter.kind != "none" else (own,)


def _swaps(config: RunConfig) -> tuple[int, ...]:
    """Return numbers of blocks to swap; between two of them `_fewest_swapped` looks closer."""
    own = config.memory.blocks_to_swap
    if config.adapter.kind == "none":
        return (own,)
    blocks = workload_of(config).shape.num_layers
    return tuple(sorted({own, *(blocks * quarter // 4 for quarter in range(5))}))


def _chunks(config: RunConfig) -> tuple[int, ...]:
    return tuple(sorted({config.memory.feed_forward_chunks, 1, 4}))


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


def _tiles(config: RunConfig, settings: Settings, judge: Judge) -> Settings:
    """Return the largest VAE tile with which encoding and decoding fit, if it must be changed."""
    own = config.memory.vae_tile
    smallest: Settings = {}
    for tile in (own, *(t for t in _TILES if t is not None and t < (own or 1 << 30))):
        smallest = {} if tile == own else {"memory.vae_tile": tile}
        result: Estimate = judge({**settings, **smallest})
        assert result.gpu is not None
        share = 1 + result.margin_bytes / max(result.peak_bytes, 1)
        worst = max(result.phase(name).peak_bytes for name in ("latents", "sampling"))
        if worst * share <= result.gpu.memory_bytes:
            return smallest
    return smallest


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    if section == "dataset":
        return config.dataset.general.get("batch_size", 1)
    return getattr(getattr(config, section), name)
