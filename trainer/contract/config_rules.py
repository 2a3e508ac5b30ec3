"""What goes with what: rules between sections, each with the reason and the alternative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from trainer.contract.adapter_kind_rules import adapter_kind_rule
from trainer.contract.adapter_rules import adapter_files, adapter_rule
from trainer.contract.catalog import ATTENTION
from trainer.contract.cluster_rules import cluster_rule, hostfile_problems
from trainer.contract.config import RunConfig
from trainer.contract.denoising_rules import denoising_rule
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.expert_rules import experts_rule
from trainer.contract.experts import (
    boundary_of,
    expert_timesteps,
    single_expert,
    trained_experts,
    trains_both,
)
from trainer.contract.hub import MODEL_FIELDS, is_offline, is_reference, references
from trainer.contract.loraid_rules import loraid_rule
from trainer.contract.memory_rules import activations_rule, compile_rule, streaming_rule
from trainer.contract.objective_rules import noise_rule, objective_rule
from trainer.contract.offload_rules import offload_rule
from trainer.contract.optimizer_rules import average_rule, optimizer_rule, schedule_rule
from trainer.contract.optimizer_traits import traits_of
from trainer.contract.registry import nearest
from trainer.contract.sample_formats import format_rule
from trainer.contract.sequence_rules import sequence_rule
from trainer.contract.stored_kinds import layout_problem
from trainer.contract.variants import VARIANTS
from trainer.contract.walk import walk_problems

JobName = Literal["cache", "train", "sample", "decode", "eval"]
Rule = Callable[[RunConfig], Iterator[Problem]]


def check_rules(config: RunConfig) -> list[Problem]:
    """Return every rule that the config breaks; files are not looked at."""
    return [problem for rule in _RULES for problem in rule(config)]


def check_files(config: RunConfig, job: JobName) -> list[Problem]:
    """Return what `job` needs and the config does not name, and named files that do not exist."""
    model = config.model
    problems = [
        Problem("needed, but not given", f"model.{field}")
        for field in _required_files(config, job)
        if getattr(model, field) is None
    ]
    named: list[tuple[str, Path | None]] = [
        (f"model.{field}", getattr(model, field)) for field in MODEL_FIELDS
    ]
    named += adapter_files(config)
    named.append(("dataset.file", config.dataset.file))
    named.append(("sampling.prompts_file", config.sampling.prompts_file))
    for index, use in enumerate(config.sampling.loras):
        named.append((f"sampling.loras[{index}].path", use.path))
    for index, prompt in enumerate(config.sampling.prompts):
        named.append((f"sampling.prompts[{index}].image", prompt.image))
        named.append((f"sampling.prompts[{index}].last_image", prompt.last_image))
        named.append((f"sampling.prompts[{index}].control", prompt.control))
    problems += [
        Problem(f"no such file or folder: {path}", key, hint=f"looked in {path.absolute().parent}")
        for key, path in named
        if path is not None and not path.exists() and not is_reference(path)
    ]
    if is_offline():
        problems += [
            Problem(
                f"not in the cache of the hub, and HF_HUB_OFFLINE is set: {file}", f"model.{key}"
            )
            for key, file in references(config).items()
        ]
    if job == "train":
        problems += hostfile_problems(config)
    has_validation = bool(config.validation.split or config.validation.sources)
    if job in {"cache", "train"} or (job == "eval" and has_validation):
        problems += _dataset_files(config)
    return problems


def _dataset_files(config: RunConfig) -> list[Problem]:
    """Return what is missing of the clips: all of them, a dataset file's own faults, folders."""
    file = config.dataset.file
    if file is None and not config.dataset.sources:
        hint = "give dataset.file or [[dataset.sources]]"
        return [Problem("no dataset", "dataset", hint=hint)]
    if file is not None and not file.exists():
        return []  # reported with the other files
    try:
        dataset = config.dataset.load()
    except ConfigError as error:
        return list(error.problems)
    list_name = "dataset.sources" if file is None else "datasets"
    listed = [(f"{list_name}[{i}]", file, source) for i, source in enumerate(dataset.sources)]
    own = config.validation.load_sources(dataset.general)
    listed += [(f"validation.sources[{i}]", None, source) for i, source in enumerate(own)]
    return [
        Problem(
            f"no such file or folder: {source.media_path}",
            key,
            named_in,
            hint=f"looked in {source.media_path.absolute().parent}",
        )
        for key, named_in, source in listed
        if not source.media_path.exists()
    ]


def validation_timesteps(config: RunConfig, expert_boundary: float) -> tuple[float, ...]:
    """Return those of `validation.timesteps` at which the trained expert works.

    That is all of them for a model without experts, or a run with both. The
    high-noise expert works at the boundary, too, as in sampling.
    """
    boundary = 1000 * expert_boundary
    expert = single_expert(config)
    return tuple(
        timestep
        for timestep in config.validation.timesteps
        if expert is None or (timestep >= boundary) == (expert == "high_noise")
    )


def trained_timesteps(config: RunConfig, expert_boundary: float) -> tuple[float, float]:
    """Return the trained range of timesteps in [0, 1000], the expert's own where none is given.

    Of a run with both experts: that of both together.
    """
    experts = trained_experts(config)
    if experts:
        ranges = [expert_timesteps(config, expert, expert_boundary) for expert in experts]
        return min(low for low, _ in ranges), max(high for _, high in ranges)
    low, high = config.objective.min_timestep, config.objective.max_timestep
    return (0.0 if low is None else low, 1000.0 if high is None else high)


def is_fp8(config: RunConfig) -> bool:
    """Tell whether the transformer's blocks are held in fp8."""
    return config.memory.weight_format in {"fp8", "fp8_scaled"}


def _required_files(config: RunConfig, job: JobName) -> list[str]:
    if job == "decode":
        return ["vae"]
    known = VARIANTS.get(config.model.variant)
    encoders = ["vae", "text_encoder"]
    if known is not None and known.transformer.image_dim is not None:
        encoders.append("image_encoder")
    if job == "cache":
        return encoders
    samples = job == "train" and config.sampling.while_training
    if samples or job == "sample" or (job == "eval" and config.probe.kind != "none"):
        both = known is not None and known.experts
        return ["transformer", *(["transformer_high_noise"] if both else []), *encoders]
    if trains_both(config):
        return ["transformer", "transformer_high_noise"]
    return ["transformer_high_noise" if config.model.expert == "high_noise" else "transformer"]


def _variant(config: RunConfig) -> Iterator[Problem]:
    name = config.model.variant
    if name != "auto" and name not in VARIANTS:
        hint = nearest(name, VARIANTS)
        yield Problem(f"unknown model variant {name!r}", "model.variant", hint=hint)


def _timesteps(config: RunConfig) -> Iterator[Problem]:
    if config.model.expert is not None:
        return  # `experts_rule` judges the range of each expert
    low, high = trained_timesteps(config, 0.0)
    if low < high:
        return
    key = "max_timestep" if config.objective.min_timestep is None else "min_timestep"
    yield Problem(
        f"the range of trained timesteps is empty: {low:g} to {high:g}",
        f"objective.{key}",
        hint="min_timestep must be smaller than max_timestep",
    )


def _dataset(config: RunConfig) -> Iterator[Problem]:
    if config.dataset.file is not None and (config.dataset.sources or config.dataset.general):
        yield Problem(
            "a dataset file and inline keys at once",
            "dataset.file",
            hint="keep the file, or the inline [dataset.general] and [[dataset.sources]]",
        )


def _sampling(config: RunConfig) -> Iterator[Problem]:
    sampling = config.sampling
    if sampling.prompts and sampling.prompts_file:
        yield Problem(
            "prompts inline and in a file at once",
            "sampling.prompts_file",
            hint="keep one of the two",
        )
    wanted = sampling.while_training
    if wanted and not sampling.prompts and not sampling.prompts_file:
        yield Problem(
            "samples are wanted, but there is no prompt",
            f"sampling.{sampling.interval_key if sampling.repeats else 'at_start'}",
            hint="add [[sampling.prompts]] or sampling.prompts_file",
        )
    walks = [("sampling.", sampling.solver, sampling.schedule, 1.0)]
    walks += [
        (
            f"sampling.prompts[{index}].",
            prompt.solver or sampling.solver,
            sampling.schedule if prompt.schedule is None else prompt.schedule,
            prompt.strength or 1.0,
        )
        for index, prompt in enumerate(sampling.prompts)
        if prompt.solver or prompt.schedule
    ]
    for place, solver, schedule, strength in walks:
        for problem in walk_problems(solver, schedule, strength=strength):
            yield replace(problem, key=place + problem.key)
    yield from format_rule(sampling)
    yield from _num_frames(config)


def _validation(config: RunConfig) -> Iterator[Problem]:
    validation = config.validation
    if validation.split and validation.sources:
        yield Problem(
            "clips held out of the dataset and clips of its own at once: the loss would be a mean "
            "over both",
            "validation.split",
            hint="keep split, or [[validation.sources]]",
        )
    if validation.repeats and not validation.split and not validation.sources:
        yield Problem(
            "a validation loss is wanted, but there is no clip to measure it on",
            f"validation.{validation.interval_key}",
            hint="set validation.split = 0.1, or add [[validation.sources]]",
        )
    boundary = boundary_of(config)
    if not boundary or config.model.expert is None:
        return  # nothing to judge, or `experts_rule` says what is wrong
    if validation.repeats and not validation_timesteps(config, boundary):
        side = "not below" if config.model.expert == "high_noise" else "below"
        yield Problem(
            f"the {config.model.expert} expert works at none of these timesteps",
            "validation.timesteps",
            hint=f"give some {side} {1000 * boundary:g}",
        )


def _num_frames(config: RunConfig) -> Iterator[Problem]:
    counts = [("sampling.num_frames", config.sampling.num_frames)]
    counts += [
        (f"sampling.prompts[{index}].num_frames", prompt.num_frames)
        for index, prompt in enumerate(config.sampling.prompts)
    ]
    for key, count in counts:
        if count is not None and count % 4 != 1:
            low = max(1, (count - 1) // 4 * 4 + 1)
            yield Problem(
                f"{count} frames: Wan makes 4n + 1 frames", key, hint=f"use {low} or {low + 4}"
            )


def _distributed(config: RunConfig) -> Iterator[Problem]:
    distributed = config.distributed
    if distributed.engine == "local":
        if distributed.zero_stage:
            yield Problem(
                f"the local engine has no ZeRO stage {distributed.zero_stage}",
                "distributed.zero_stage",
                hint='set zero_stage = 0, or engine = "deepspeed"',
            )
        if (distributed.num_processes or 1) > 1:
            yield Problem(
                "the local engine is one process",
                "distributed.num_processes",
                hint='set num_processes = 1, or engine = "deepspeed"',
            )


def _full_finetune(config: RunConfig) -> Iterator[Problem]:
    if config.adapter.kind != "none" or config.memory.weight_format != "bf16":
        return
    if config.distributed.engine == "local":
        return
    traits = traits_of(config.optimizer.kind)
    if not traits.elementwise:  # a stage that it works at has no masters, and the other way round
        if not traits.bf16_only:
            yield Problem(
                "training bf16 weights needs fp32 master copies, which DeepSpeed keeps from ZeRO-1 "
                f"on only, and there {traits.why_whole}",
                "optimizer.kind",
                hint='set distributed.engine = "local" and zero_stage = 0 (one GPU), '
                'memory.weight_format = "fp32", or use adamw',
            )
        return
    stage = config.distributed.zero_stage
    if stage == 0:
        yield Problem(
            "training bf16 weights needs fp32 master copies; DeepSpeed keeps them from ZeRO-1 on",
            "distributed.zero_stage",
            hint='set zero_stage = 2, or memory.weight_format = "fp32"',
        )
    if stage == 1 and config.training.gradient_accumulation_steps > 1:
        yield Problem(
            "ZeRO-1 has no exact way to add up the gradients of bf16 weights over microbatches",
            "distributed.zero_stage",
            hint="set zero_stage = 2, or training.gradient_accumulation_steps = 1",
        )


def _attention(config: RunConfig) -> Iterator[Problem]:
    name = config.memory.attention
    if name not in ATTENTION:
        hint = nearest(name, ATTENTION.names)
        yield Problem(f"unknown attention {name!r}", "memory.attention", hint=hint)
    elif name != "sdpa" and config.memory.keep_attention:
        yield Problem(
            f"only what torch's own attention returns can be kept, not that of {name}",
            "memory.keep_attention",
            hint='leave it out, or set memory.attention = "sdpa"',
        )


def _fp8(config: RunConfig) -> Iterator[Problem]:
    memory = config.memory
    if not is_fp8(config):
        wanted = 'set memory.weight_format = "fp8_scaled", or leave it out'
        if memory.fp8_format != "e4m3":
            yield Problem("has a meaning with fp8 weights only", "memory.fp8_format", hint=wanted)
        if memory.fp8_matmul:
            yield Problem("has a meaning with fp8 weights only", "memory.fp8_matmul", hint=wanted)
        return
    if config.adapter.kind == "none":
        yield Problem(
            "fp8 weights are frozen: updates are smaller than their steps and would be lost",
            "memory.weight_format",
            hint='set weight_format = "bf16", or adapter.kind = "lora"',
        )
    if memory.fp8_matmul and memory.fp8_format != "e4m3":
        yield Problem(
            "GPUs multiply e4m3 with e4m3; e5m2 weights have too few bits for it",
            "memory.fp8_format",
            hint='set fp8_format = "e4m3", or fp8_matmul = false',
        )


def _output(config: RunConfig) -> Iterator[Problem]:
    if config.adapter.kind == "none" and config.output.layout != "comfy":
        yield Problem(
            f"layout {config.output.layout!r} is for adapters; a full fine-tune is a whole model",
            "output.layout",
            hint="leave layout out (the file gets Wan's own names, which ComfyUI reads)",
        )
    problem = layout_problem(config.adapter.kind, config.output.layout, "output.layout")
    if problem is not None:
        yield problem


_RULES: tuple[Rule, ...] = (
    _variant,
    experts_rule,
    _timesteps,
    objective_rule,
    noise_rule,
    _dataset,
    _sampling,
    denoising_rule,
    _validation,
    _distributed,
    sequence_rule,
    cluster_rule,
    offload_rule,
    optimizer_rule,
    schedule_rule,
    average_rule,
    _full_finetune,
    streaming_rule,
    activations_rule,
    compile_rule,
    _attention,
    _fp8,
    loraid_rule,
    _output,
    adapter_rule,
    adapter_kind_rule,
)
