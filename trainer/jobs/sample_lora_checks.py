"""What is wrong with the LoRAs of a sampling run, told from headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainer.adapters import load_adapter
from trainer.adapters.apply import fitting_modules
from trainer.adapters.base import AdapterFile
from trainer.adapters.difference import fitting_differences, shown_in_blocks
from trainer.adapters.rank_mask import RankSchedule
from trainer.contract.config import RunConfig
from trainer.contract.config_rules import is_fp8
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.contract.loraid_metadata import SLOT_EXPERTS
from trainer.contract.variants import Expert, Variant
from trainer.io.mapped_load import open_weights
from trainer.jobs.lora_files import lora_file, parts_in
from trainer.jobs.merge_weights import linear_shapes, shapes_of
from trainer.jobs.sample_loras import open_for, uses_in
from trainer.models.wan.detect import official_tensors
from trainer.sampling.requests import SampleRequest

_TOLD_BY = ("menma.expert", "ss_loraid_expert")
_COMPILED_STRENGTHS = 4
"""torch compiles one piece of code eight times at most, and some of them go to other causes."""
_EXPERT_WORDS: dict[str, Expert | None] = dict(SLOT_EXPERTS.items())


def check_loras(
    uses: Sequence[LoRAUse], variant: Variant, transformers: Mapping[Expert, Path]
) -> list[str]:
    """See that each LoRA fits the transformer that it is for; return what people should know.

    Args:
        uses: the run's LoRAs.
        variant: what they are used with.
        transformers: weight file of each expert; models with one transformer have `low_noise`.

    Raises:
        ConfigError: an expert is asked for that the model has not.
        ModelFileError: a LoRA cannot be read, or is for another model; names layers and models.
    """
    if not variant.experts and (problems := list(_no_experts(uses, variant))):
        raise ConfigError(problems=problems)
    used: dict[Expert, dict[int, AdapterFile]] = {}
    for expert, path in transformers.items() if uses else ():
        used[expert] = open_for(uses, expert if variant.experts else None)
        files = open_weights(path)
        tensors = official_tensors(files)
        shapes = linear_shapes(files, tensors)
        for adapter in used[expert].values():
            fitting_modules(shapes, adapter)
            fitting_differences(shapes_of(files, tensors, adapter.differences), adapter)
    return [*_expert_notes(uses, variant, used)]


def check_merge(
    uses: Sequence[LoRAUse], requests: Sequence[SampleRequest], config: RunConfig
) -> None:
    """Refuse to add LoRAs to the weights where that would not do what was asked for.

    Raises:
        ConfigError: names the first reason.
        ModelFileError: a LoRA cannot be read.
    """
    reason = next(_obstacles(uses, requests, config), None)
    if reason is not None:
        raise ConfigError(f"the LoRAs cannot be merged: {reason}", hint="leave --merge out")


def check_compiled(
    uses: Sequence[LoRAUse],
    requests: Sequence[SampleRequest],
    variant: Variant,
    config: RunConfig,
) -> None:
    """Refuse more strengths than attached LoRAs in compiled blocks can have.

    Blocks are compiled anew for each strength, for minutes, and after a few times torch gives
    up and runs them as they are. So it does with whole differences of their norms.

    Raises:
        ConfigError: says how many strengths there are, or names the file and the difference.
        ModelFileError: a LoRA cannot be read.
    """
    if not config.memory.compile_blocks or not uses:
        return
    for use in uses:
        for adapter in _parts_of(use):
            if (held := shown_in_blocks(adapter)) is not None:
                raise ConfigError(
                    f"{use.path} holds {held}, a whole difference that compiled blocks do not take "
                    "(memory.compile_blocks)",
                    hint="set it to false, or add the LoRA to the weights: --merge",
                )
    found = {
        tuple(
            use.strength_at(high_noise=high_noise, share=step / max(1, request.num_steps - 1))
            for use in uses_in(request, uses)
        )
        for request in requests
        for step in range(request.num_steps)
        for high_noise in ((False, True) if variant.experts else (False,))
    }
    if len(found) > _COMPILED_STRENGTHS:
        raise ConfigError(
            f"memory.compile_blocks compiles the blocks anew for each strength of the LoRAs, and "
            f"these samples have {len(found)}",
            hint=f"set it to false, or use {_COMPILED_STRENGTHS} strengths or fewer",
        )


def _obstacles(
    uses: Sequence[LoRAUse], requests: Sequence[SampleRequest], config: RunConfig
) -> Iterator[str]:
    if is_fp8(config):
        yield (
            f"memory.weight_format is {config.memory.weight_format}, and rounding the sums to it "
            "would swallow much of what the LoRAs add"
        )
    scheduled = next((use for use in uses if use.is_scheduled), None)
    if scheduled is not None:
        yield f"the strength of {scheduled.path} changes from step to step"
    if any(uses_in(request, uses) != uses_in(requests[0], uses) for request in requests):
        yield "their strengths differ from sample to sample"
    for use in uses:
        adapter = next(_parts_of(use))
        if RankSchedule.of_file(adapter.metadata, use.path) is not None:
            yield f"{use.path} is a T-LoRA, which acts with other ranks at each timestep"


def _parts_of(use: LoRAUse) -> Iterator[AdapterFile]:
    """Yield what a file holds for each expert that it is used for."""
    for expert in (use.expert,) if use.expert else (parts_in(use.path) or (None,)):
        yield load_adapter(use.path, expert=expert, differences=True)


def _no_experts(uses: Sequence[LoRAUse], variant: Variant) -> Iterator[Problem]:
    for use in uses:
        strength = isinstance(use, SampleLoRA) and use.strength_high_noise is not None
        if use.expert is not None or strength:
            what = f"for the {use.expert} expert" if use.expert else "a strength for each expert"
            yield Problem(
                f"{use.path} is given {what}, and {variant.name} has one transformer",
                hint="leave the expert out",
            )


def _expert_notes(
    uses: Sequence[LoRAUse], variant: Variant, used: Mapping[Expert, Mapping[int, AdapterFile]]
) -> Iterator[str]:
    """Yield where a LoRA says that it is for another expert, and experts that get none."""
    for use in uses:
        told = _told(use)
        if told is None:
            continue
        if not variant.experts:
            yield (
                f"{use.path} says that it is for the {told} expert of Wan 2.2, and {variant.name} "
                "has one transformer: it may do little good"
            )
        elif use.expert not in {None, told}:
            yield (
                f"{use.path} says that it is for the {told} expert, and is used with {use.expert} "
                "as asked for"
            )
    for expert in used if variant.experts else ():
        if not used[expert]:
            others = ", ".join(use.path.name for use in uses)
            yield (
                f"no LoRA is for the {expert} expert ({others} is for the other one): it samples "
                "without; --lora FILE@" + expert + " uses a file with it"
            )


def _told(use: LoRAUse) -> Expert | None:
    """Return the expert that a file's metadata name, None where they name none or both."""
    metadata = open_weights(lora_file(use.path)).metadata
    words = {metadata.get(key, "") for key in _TOLD_BY}
    found = {_EXPERT_WORDS.get(word, word) for word in words}
    return next((expert for expert in EXPERTS if found & set(EXPERTS) == {expert}), None)
