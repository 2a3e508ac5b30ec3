"""Comparing settings of a config: which fit a card, and which of those are fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.gpus import GPUS, Gpu
from trainer.contract.memory_model.result import Estimate

SWAP, CHECKPOINTING = "memory.blocks_to_swap", "memory.gradient_checkpointing"
LOSSY = {"memory.weight_format", "memory.fp8_matmul"}
"""Settings that change the numbers."""
LOSSY_GAIN = 0.9
"""They are taken where they need less than this share of the time."""
_PACE = GPUS["RTX 4090"]

Settings = Mapping[str, Any]
"""Key of the config -> value."""
Judge = Callable[[Settings], Estimate]


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings, and what the config takes with them."""

    settings: Settings
    result: Estimate
    """Of the phases that these settings are chosen for."""

    @property
    def exact(self) -> bool:
        """Whether the numbers stay those of the config."""
        return not self.settings.keys() & LOSSY

    @property
    def fits(self) -> bool:
        """Whether it fits, margin included."""
        return self.result.verdict == "fits"

    @property
    def seconds(self) -> float:
        """Time of an update."""
        return self.result.step_seconds or 0.0


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


def paced(gpu: Gpu) -> Gpu:
    """Return the card; with another one's arithmetic, to order settings by, where its own is
    not known."""
    if gpu.bf16_tflops:
        return gpu
    return replace(_PACE, name=gpu.name, memory_gib=gpu.memory_gib)


def best_choice(choices: Sequence[Choice]) -> Choice:
    """Return the fastest that fits; the smallest where none does."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda one: (one.result.peak_bytes, len(one.settings)))

    def order(choice: Choice) -> tuple[float, int]:
        seconds = choice.seconds if choice.exact else choice.seconds / LOSSY_GAIN
        return seconds, len(choice.settings)

    return min(fitting, key=order)


def fewest_swapped(best: Choice, judge: Judge) -> Choice:
    """Return the same with no more blocks swapped than it takes to fit; none is not tried."""
    most = best.settings.get(SWAP, 0)
    if not best.fits:
        return best
    least = 0
    while most - least > 1:
        number = (least + most) // 2
        settings = {**best.settings, SWAP: number}
        fewer = Choice(settings, judge(settings))
        if fewer.fits:
            best, most = fewer, number
        else:
            least = number
    return best
