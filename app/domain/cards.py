"""The GPU that an estimate is for, and what runs on this machine have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from app.domain.environment import GIB, gpus, ram_bytes
from trainer.contract.config import Prompt, RunConfig
from trainer.contract.errors import ConfigError, UserError
from trainer.contract.memory_model import (
    Circumstances,
    Clip,
    Correction,
    Estimate,
    Gpu,
    Verdict,
    caching_seconds,
    estimate,
    estimate_sampling,
    find_gpu,
    gpu_of_memory,
    measured_correction,
    memory_verdict,
)
from trainer.contract.variants import VARIANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU and how many of it there are."""

    gpu: Gpu
    count: int = 1
    here: bool = False
    """It is in this machine."""


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
    config = _as_variant(config, variant)
    return estimate(config, card.gpu, circumstances(config, card))


def caching_here(
    config: RunConfig, variant: str, windows: Mapping[Clip, int], num_captions: int
) -> tuple[float, str] | None:
    """Return the seconds of caching on this machine's GPU, and its name; None: not known.

    Args:
        config: checked.
        variant: what `model.variant = "auto"` was found to be.
        windows: size -> how many of it.
        num_captions: captions.
    """
    card = choose_card(None, None) if variant in VARIANTS else None
    if card is None:
        return None
    found = caching_seconds(_as_variant(config, variant), card.gpu, windows, num_captions)
    return None if found is None else (found, card.gpu.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTime:
    """How long sampling takes on this machine's GPUs."""

    seconds: float
    at_most: bool
    """A step cache will spare some of it."""
    gpu: str


def sampling_here(config: RunConfig, prompts: Sequence[Prompt]) -> SamplingTime | None:
    """Return how long sampling takes on this machine's GPUs; None: not known.

    Args:
        config: checked.
        prompts: what is made; settings that they leave open are the config's.
    """
    on_gpu = prompts and config.distributed.device != "cpu"
    card = choose_card(None, None) if on_gpu else None
    if card is None:
        return None
    sampling = config.sampling.model_copy(update={"prompts": tuple(prompts)})
    try:
        found = estimate_sampling(
            config.model_copy(update={"sampling": sampling}),
            card.gpu,
            num_gpus=card.count if _has_processes(config) else 1,
        )
    except ConfigError:  # the job says what is wrong
        return None
    if found.total_s is None:
        return None
    return SamplingTime(seconds=found.total_s, at_most=found.at_most, gpu=card.gpu.name)


def _has_processes(config: RunConfig) -> bool:
    """Return whether there is a process for each GPU by itself, as the trainer decides it."""
    engine = config.distributed.engine
    return engine == "deepspeed" or (engine == "auto" and find_spec("deepspeed") is not None)


def verdict_of_peak(peak_gib: float, num_gpus: int, card: Card) -> Verdict:
    """Return whether so many GPUs with so much memory are in a machine with these cards.

    Args:
        peak_gib: estimated, of each GPU; the estimate's margin is added.
        num_gpus: how many are needed.
        card: the machine's.
    """
    if num_gpus > card.count:
        return "does not fit"
    return memory_verdict(round(peak_gib * GIB), card.gpu)


def circumstances(config: RunConfig, card: Card, *, ram_gib: float | None = None) -> Circumstances:
    """Return what is known of the machine that the card is in.

    Args:
        config: checked.
        card: the GPU.
        ram_gib: RAM of the machine; None: that of this machine if the card is here.
    """
    correction = measured_correction(config) if card.here else Correction()
    machine = None if ram_gib is None else round(ram_gib * GIB)
    if machine is None and card.here:
        machine = ram_bytes()
    return Circumstances(
        num_gpus=card.count,
        correction=correction.factor,
        measured_runs=correction.runs,
        machine_bytes=machine,
    )


def _as_variant(config: RunConfig, variant: str) -> RunConfig:
    model = config.model.model_copy(update={"variant": variant})
    return config.model_copy(update={"model": model})
