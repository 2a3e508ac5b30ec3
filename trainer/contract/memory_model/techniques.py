"""What techniques add to a step and to caching, as far as it counts beside the model."""

from __future__ import annotations

from trainer.contract.config import RunConfig
from trainer.contract.memory_model.forwards import forward_seconds
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.workload import Workload

MASKED = "masked_loss"


def uses_masks(config: RunConfig) -> bool:
    """Return whether items come with masks."""
    return any(section.name == MASKED for section in config.techniques)


def base_forwards(config: RunConfig) -> int:
    """Return the forwards of the untrained model that each microbatch takes beside its own."""
    return sum(
        bool(section.options("name").get("prior_weight"))
        for section in config.techniques
        if section.name == MASKED
    )


def technique_parts(work: Workload, gpu: Gpu) -> dict[str, float]:
    """Return the seconds of one weight update that techniques take; {} for an unknown GPU.

    The adapter is off in these forwards, which run before the step's own and keep nothing.
    """
    count = base_forwards(work.config) * work.config.training.gradient_accumulation_steps
    if not count:
        return {}
    parts = forward_seconds(work, gpu, work.clip, ranks=work.sequence_ranks)
    seconds = sum(value for name, value in parts.items() if name != "LoRA")
    return {"untrained model": count * seconds} if seconds else {}
