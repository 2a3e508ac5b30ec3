"""What `auto` in `[memory]` becomes: the fastest settings that the estimate lets fit a GPU.

Swapped blocks and checkpointing change where activations and weights wait and what is computed
twice, never a number: what a run makes is the same whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.contract.config import DatasetSection, RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.memory_model.costs import JobCost
from trainer.contract.memory_model.denoising import WorkingSet
from trainer.contract.memory_model.estimating import (
    Circumstances,
    estimate_inference,
    estimate_resolved,
    estimate_workload,
    with_jobs,
)
from trainer.contract.memory_model.gpus import GIB, Gpu, find_gpu
from trainer.contract.memory_model.result import Estimate
from trainer.contract.memory_model.sampling import sampling_cost
from trainer.contract.memory_model.search import (
    CHECKPOINTING,
    SWAP,
    Choice,
    Judge,
    Settings,
    best_choice,
    fewest_swapped,
    paced,
    with_settings,
)
from trainer.contract.memory_model.videos import planned_videos, sampling_processes
from trainer.contract.memory_model.workload import variant_of, workload_of

_ON_CPU: Settings = {SWAP: 0, CHECKPOINTING: True}
_CHECKPOINTING = (False, 4, 3, 2, True)
"""From the fastest to the smallest: none, every fourth block, ..., each one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Automatic:
    """A config whose `auto` has been replaced by values."""

    config: RunConfig
    """With the values."""
    values: Mapping[str, bool | int]
    """Fields of `[memory]` that were `auto` -> what they became."""
    judged: Estimate | None = None
    """Of the phases that decided; None: nothing had to be decided for a GPU."""

    def in_words(self) -> str:
        """Return what was decided, in a line; "" where nothing was `auto`."""
        if not self.values:
            return ""
        result = self.judged
        if result is None or result.gpu is None:
            return f"{automatic_words(self.values, 0)} (on the CPU, where device memory is RAM)"
        return (
            f"{automatic_words(self.values, result.num_blocks)} for {result.gpu.name}: estimated "
            f"peak {result.peak_bytes / GIB:.1f} (± {result.margin_bytes / GIB:.1f}) of "
            f"{result.gpu.memory_gib:.1f} GiB"
        )

    def require_fit(self, *, command: str = "menma estimate CONFIG --fit") -> str:
        """Return a warning where it fits without the margin only, else "".

        Args:
            command: what finds settings that fit.

        Raises:
            RunError: no value of what is `auto` makes it fit.
        """
        result = self.judged
        if result is None or result.gpu is None or result.verdict == "fits":
            return ""
        names = " and ".join(f"memory.{field}" for field in self.values)
        peak, has = result.peak_bytes / GIB, result.gpu.memory_gib
        if result.verdict == "tight":
            return (
                f"{names} = auto: even the smallest settings leave less than the margin of the "
                f"estimate ({peak:.1f} ± {result.margin_bytes / GIB:.1f} of {has:.1f} GiB)"
            )
        raise RunError(
            f"no value of {names} makes this fit: {result.deciding.name} takes {peak:.1f} GiB by "
            f"the estimate, and {result.gpu.name} has {has:.1f} GiB for it",
            hint=f"{command} searches other settings; smaller clips need less",
        )


def automatic_words(values: Mapping[str, bool | int], num_blocks: int) -> str:
    """Return what `auto` became: `memory.blocks_to_swap = auto: 23 of 40`."""
    words = []
    for field, value in values.items():
        shown = str(value).lower()
        if field == "blocks_to_swap" and num_blocks:
            shown = f"{value} of {num_blocks}"
        elif isinstance(value, int) and value > 1:
            shown = f"{value} (every {value}{_ORDINALS.get(value, 'th')} block)"
        words.append(f"memory.{field} = auto: {shown}")
    return ", ".join(words)


_ORDINALS = {2: "nd", 3: "rd"}


def resolve_memory(
    config: RunConfig,
    gpu: Gpu | None,
    known: Circumstances | None = None,
    *,
    forwards: Sequence[WorkingSet] = (),
) -> Automatic:
    """Return the config with values in the place of `auto`; what else there is stays.

    Of the settings with which the estimate fits, margin included, these are the fastest, with no
    more blocks swapped than it takes; where none fits the smallest. The same arguments give the
    same answer.

    Args:
        config: checked.
        gpu: the card, with the memory that is to be had; None: a CPU, where nothing is swapped
            and each block is checkpointed.
        known: as in `estimate`.
        forwards: what sampling or measuring works on, where nothing is trained; left out:
            training decides, and its samples.

    Raises:
        ConfigError: the model's variant cannot be told, or the dataset cannot be read.
    """
    fields = config.memory.automatic
    if not fields:
        return Automatic(config=config, values={})
    keys = {f"memory.{field}" for field in fields}
    start = {key: value for key, value in _ON_CPU.items() if key in keys}
    base = with_settings(config, start)
    if gpu is None:
        return _automatic(base, fields)

    known = known or Circumstances()
    work = workload_of(base, num_gpus=1 if forwards else known.num_gpus)
    sampling = config.sampling
    samples = ("sampling",) if sampling.while_training else ()

    def judge(settings: Settings) -> Estimate:
        chosen = work.under(with_settings(base, settings))
        if forwards:
            return estimate_inference(chosen, forwards, gpu, known)
        return estimate_workload(chosen, paced(gpu), known, ("training", *samples))

    num_blocks = work.shape.num_layers
    checkpointing = CHECKPOINTING in keys and not forwards
    choices: list[Choice] = []
    for value in _CHECKPOINTING if checkpointing else (None,):
        settings = {} if value is None else {CHECKPOINTING: value}
        if check_rules(with_settings(base, settings)):
            continue
        if SWAP in keys:
            choices += _swapping(base, settings, num_blocks, judge)
        else:
            choices.append(Choice(settings, judge(settings)))
    best = best_choice(choices)
    return _automatic(with_settings(base, best.settings), fields, best.result)


def estimate(
    config: RunConfig, gpu: Gpu | str | None = None, known: Circumstances | None = None
) -> Estimate:
    """Return what `config` takes on each GPU.

    Args:
        config: checked; where `model.variant` is `auto`, the weight file's header tells. `auto` in
            `[memory]` is resolved for this GPU.
        gpu: the card, or its name; None: no verdict and no step time.
        known: number of GPUs, and what was measured; left out: one GPU, nothing.

    Raises:
        ConfigError: the variant cannot be told, the dataset cannot be read, or `auto` has no GPU
            that it could be chosen for.
        UserError: there is no GPU of that name.
    """
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if card is None and config.memory.automatic:
        raise ConfigError(
            f"memory.{config.memory.automatic[0]} is auto, which is chosen for a GPU, and none is "
            "named",
            hint="name the GPU, or set a value",
        )
    resolved = resolve_memory(config, card, known)
    result = estimate_resolved(resolved.config, card, known)
    return replace(with_jobs(result, resolved.config, known), automatic=resolved.values)


def estimate_sampling(config: RunConfig, gpu: Gpu, *, num_gpus: int = 1) -> JobCost:
    """Return what `menma sample` takes for the config's prompts, with `auto` as it chooses it.

    The dataset is not looked at.

    Args:
        config: checked.
        gpu: the card.
        num_gpus: processes where `distributed.num_processes` is left open.

    Raises:
        ConfigError: the variant cannot be told.
    """
    bare = config.model_copy(update={"dataset": DatasetSection()})
    videos = planned_videos(bare.sampling, variant_of(bare))
    work = workload_of(resolve_memory(bare, None).config, num_gpus=num_gpus)
    resolved = resolve_memory(
        bare,
        gpu,
        Circumstances(num_gpus=sampling_processes(work, len(videos))),
        forwards=[video.working_set(work.sequence_ranks) for video in videos],
    )
    return sampling_cost(workload_of(resolved.config, num_gpus=num_gpus), gpu)


def _swapping(
    base: RunConfig, settings: Settings, num_blocks: int, judge: Judge
) -> Iterator[Choice]:
    """Yield no swapped block if that fits, else the fewest that do; both where neither fits."""
    none = Choice({**settings, SWAP: 0}, judge({**settings, SWAP: 0}))
    yield none
    everything = {**settings, SWAP: num_blocks}
    if none.fits or check_rules(with_settings(base, everything)):
        return
    yield fewest_swapped(Choice(everything, judge(everything)), judge)


def _automatic(
    config: RunConfig, fields: Sequence[str], judged: Estimate | None = None
) -> Automatic:
    values: dict[str, Any] = {field: getattr(config.memory, field) for field in fields}
    if judged is not None:
        judged = replace(judged, automatic=values)
    return Automatic(config=config, values=values, judged=judged)
