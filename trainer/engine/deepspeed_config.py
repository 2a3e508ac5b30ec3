"""The only source of DeepSpeed configs: built from few typed values, every known trap refused.

DeepSpeed ignores unknown keys and accepts combinations that train wrongly without a word; each
rule below says what would happen. Measured with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.contract.errors import ConfigError, Problem
from trainer.engine.offload import (
    NO_OFFLOAD,
    SWAPPABLE_ELEMENTS,
    Offload,
    offload_problems,
    offload_sections,
)

ZERO_STAGES = (0, 1, 2, 3)
PERSISTENCE_THRESHOLD = 1_000_000
"""Parameters with fewer elements stay whole under ZeRO-3, so that LoRA factors are not sharded."""
BUCKET_ELEMENTS = 50_000_000
"""Most gradients that are reduced together."""

_TOP_LEVEL_KEYS = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "bf16",
    "data_types",
    "timers",
    "steps_per_print",
}
_REFUSED_KEYS = {
    "round_robin_gradients": "reading weights back returns those of other parameters",
    "zeropp_loco_param": "it was removed from DeepSpeed",
}


def build_deepspeed_config(  # noqa: PLR0913 - keywords, each with a value of its own
    *,
    zero_stage: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    full_finetune_bf16: bool = False,
    elementwise_optimizer: bool = True,
    num_trained: int = BUCKET_ELEMENTS,
    largest_weight: int = 0,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
    offload: Offload = NO_OFFLOAD,
) -> dict[str, Any]:
    """Return the DeepSpeed config of a run.

    Stage 0 clips nothing by itself: the engine does it there, since DeepSpeed reports no norm.

    Args:
        zero_stage: 0 to 3.
        gradient_accumulation_steps: microbatches per update.
        max_grad_norm: 0 switches clipping off.
        full_finetune_bf16: train the model's own bf16 weights through fp32 masters; otherwise
            no precision section is written and every parameter keeps its dtype.
        elementwise_optimizer: see `OptimizerFactory.elementwise`.
        num_trained: trained elements; no bucket is made larger, since it is allocated in full.
        largest_weight: elements of the model's largest weight, which buffers have to hold.
        persistence_threshold: stage 3 keeps parameters with fewer elements whole.
        offload: what waits outside the GPU.

    Raises:
        ConfigError: the combination trains wrongly.
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage:
        bucket = max(1, min(BUCKET_ELEMENTS, num_trained))
        zero |= {"reduce_bucket_size": bucket, "overlap_comm": zero_stage > 1}
    if offload.parameters == "nvme":  # what stays whole must not have to come out of files
        persistence_threshold = min(persistence_threshold, SWAPPABLE_ELEMENTS)
    if zero_stage == 3:
        zero |= {
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": persistence_threshold,
        }
    zero |= offload_sections(offload, largest_weight)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": float(max_grad_norm) if zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its throughput timer waits for the GPU twice a step.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 1_000_000_000,
    }
    if full_finetune_bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if gradient_accumulation_steps > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if offload.optimizer != "none":
        # torch's AdamW steps on the CPU as it is, where DeepSpeed's own has to be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
    lint_deepspeed_config(config, elementwise_optimizer=elementwise_optimizer)
    return config


def lint_deepspeed_config(config: dict[str, Any], *, elementwise_optimizer: bool) -> None:
    """Refuse a config that DeepSpeed would take and train wrongly with.

    Raises:
        ConfigError: with every problem at once.
    """
    problems = [
        *_unknown_keys(config),
        *_refused_keys(config),
        *_precision(config),
        *_stage(config, elementwise_optimizer),
        *offload_problems(config),
    ]
    if problems:
        raise ConfigError(problems=problems)


def _unknown_keys(config: dict[str, Any]) -> Iterator[Problem]:
    for key in config.keys() - _TOP_LEVEL_KEYS:
        yield Problem(
            "DeepSpeed would ignore this key, or it is one Menma must not set",
            key=key,
            hint=f"known: {', '.join(sorted(_TOP_LEVEL_KEYS))}",
        )


def _refused_keys(config: dict[str, Any]) -> Iterator[Problem]:
    for key in config.get("zero_optimization", {}):
        if key in _REFUSED_KEYS or key.startswith("mics_"):
            reason = _REFUSED_KEYS.get(key, "it was removed from DeepSpeed")
            yield Problem(reason, key=f"zero_optimization.{key}")


def _precision(config: dict[str, Any]) -> Iterator[Problem]:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    bf16 = config.get("bf16", {}).get("enabled", False)
    fp32_sums = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if bf16 and stage == 0:
        yield Problem(
            "training bf16 weights at stage 0 makes an extra optimizer step at the start, which "
            "spoils Adam's bias correction and decays the weights",
            key="distributed.zero_stage",
            hint="set zero_stage = 2, or distributed.engine = 'local' for one process",
        )
    if fp32_sums and stage == 1:
        yield Problem(
            "accumulating bf16 gradients in fp32 at stage 1 uses another optimizer of DeepSpeed, "
            "whose state Menma does not save",
            key="distributed.zero_stage",
            hint="set zero_stage = 2, or training.gradient_accumulation_steps = 1",
        )
    if fp32_sums and not bf16:
        yield Problem("only has a meaning with bf16", key="data_types.grad_accum_dtype")


def _stage(config: dict[str, Any], elementwise_optimizer: bool) -> Iterator[Problem]:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in ZERO_STAGES:
        yield Problem(f"is {stage!r}, not 0, 1, 2 or 3", key="distributed.zero_stage")
    if stage and not elementwise_optimizer:
        yield Problem(
            "this optimizer looks at whole tensors or at all gradients together, and ZeRO stages "
            "1 to 3 show it flat shards: it would train differently without an error",
            key="distributed.zero_stage",
            hint="set zero_stage = 0, or optimizer.kind = 'adamw'",
        )
    if stage == 0 and config.get("gradient_clipping"):
        yield Problem("stage 0 reports no norm: the engine clips there", key="gradient_clipping")
    if stage == 3 and zero.get("memory_efficient_linear", True):
        yield Problem(
            "replaces torch.nn.functional.linear in the whole process and never restores it",
            key="zero_optimization.memory_efficient_linear",
            hint="set it to false",
        )
