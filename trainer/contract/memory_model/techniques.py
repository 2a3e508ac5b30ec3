"""What techniques add to a step and to caching, as far as it counts beside the model."""

from __future__ import annotations

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.forwards import forward_seconds
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.workload import Workload
from trainer.contract.plugin_options import all_options

MASKED = "masked_loss"
_SLIDER = "concept_slider"
_SHARES = {"blank_prompt_preservation": "blank_share", "output_preservation": "class_share"}
"""Techniques that ask the untrained model of a share of the items -> the option that says it."""


def uses_masks(config: RunConfig) -> bool:
    """Return whether items come with masks."""
    return any(section.name == MASKED for section in config.techniques)


def base_forwards(config: RunConfig, batch_size: int) -> float:
    """Return the forwards of the untrained model that a microbatch takes beside its own.

    Args:
        config: of the run.
        batch_size: of a microbatch, with ZeRO-3 of those of all processes together; what asks for
            a share of items runs if one of them is in it.
    """
    count = 0.0
    for section in config.techniques:
        options = all_options("technique", section.name, section.options("name"))
        if section.name == MASKED:
            count += bool(options["prior_weight"])
        elif section.name in _SHARES:
            count += 1 - (1 - options[_SHARES[section.name]]) ** batch_size
        elif section.name == _SLIDER:
            count += 3
    return count


def technique_parts(work: Workload, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of one weight update that techniques take; {} for an unknown GPU.

    The adapter is off in these forwards, which run before the step's own and keep nothing.
    """
    # Processes that share weights run as many forwards, so that one of them asks for all.
    together = work.world_size // work.sequence_ranks if work.zero_stage == 3 else 1
    count = (
        base_forwards(work.config, work.clip.batch * together)
        * work.config.training.gradient_accumulation_steps
    )
    if not count:
        return {}
    parts = forward_seconds(work, gpu, work.clip, ranks=work.sequence_ranks)
    seconds = sum(value for name, value in parts.items() if name != "LoRA")
    return {"untrained model": count * seconds} if seconds else {}
