"""From a config to objects: plug-ins, weights, devices. The composition root's parts list."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from trainer.contract.catalog import ATTENTION, PLUGIN_KINDS, TECHNIQUES
from trainer.contract.config import RunConfig, TechniqueSection
from trainer.contract.config_io import problems_of
from trainer.contract.config_rules import is_fp8, trained_timesteps
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.experts import trained_experts
from trainer.contract.memory_rules import too_many_blocks
from trainer.contract.plugin_section import PluginSection
from trainer.contract.variants import Expert
from trainer.core.flow import NUM_TRAIN_TIMESTEPS
from trainer.core.seams import BuildContext, Need, Technique
from trainer.data.fingerprint import digest, model_identity
from trainer.engine.deepspeed import is_installed
from trainer.jobs.companions import attach_companions, companion_facts
from trainer.memory.block_swap import BlockSwap, spread
from trainer.memory.checkpoint_offload import CheckpointOffload
from trainer.memory.host_share import HostShare
from trainer.memory.streams import Streams, streams_of
from trainer.models.wan.quantised import FP8_FORMATS, hold_bytes
from trainer.models.wan.transformer import WanTransformer
from trainer.quant.fp8 import Fp8Spec
from trainer.training.step import Objective, SigmaRange

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HeldElsewhere = Callable[[int], Collection[int]]
"""Given the number of blocks, which of them another process of this machine holds."""
WeightsSource = Callable[[torch.device, HeldElsewhere | None], WanTransformer]
"""Makes a transformer on a device: from a file, or from random numbers."""


def build_plugin(section: PluginSection, slot: str, build: BuildContext, *, where: str) -> Any:
    """Import the plug-in chosen in `section.<slot>`, check its options and make it.

    Raises:
        ConfigError: an option breaks a rule that only the plug-in itself knows.
    """
    implementation: Any = PLUGIN_KINDS[section.slots[slot]].load(getattr(section, slot))
    try:
        options = implementation.Config(**section.options(slot))
    except ValidationError as error:
        problems = problems_of(error, implementation.Config, prefix=where)
        raise ConfigError(problems=problems) from error
    return implementation(options, build)


def build_objective(config: RunConfig, build: BuildContext) -> Objective:
    """Make sampler, loss and weighting, and the range of sigmas that is trained."""
    section = config.objective
    low, high = trained_timesteps(config, build.variant.expert_boundary)
    return Objective(
        sampler=build_plugin(section, "timestep_sampler", build, where="objective"),
        loss=build_plugin(section, "loss", build, where="objective"),
        weighting=build_plugin(section, "weighting", build, where="objective"),
        sigmas=SigmaRange(
            low=low / NUM_TRAIN_TIMESTEPS,
            high=high / NUM_TRAIN_TIMESTEPS,
            preserve_shape=section.preserve_distribution_shape,
        ),
        patch_size=build.variant.transformer.patch_size,
    )


def build_techniques(
    config: RunConfig, build: BuildContext, largest_batch: int
) -> tuple[Technique, ...]:
    """Make the techniques in config order.

    Raises:
        ConfigError: a technique needs what this run does not have.
    """
    problems = technique_problems(config, largest_batch)
    if problems:
        raise ConfigError(problems=problems)
    return tuple(
        build_plugin(section, "name", build, where=f"techniques[{index}]")
        for index, section in enumerate(config.techniques)
    )


def technique_problems(config: RunConfig, largest_batch: int) -> list[Problem]:
    """Return what the techniques need and this run does not have."""
    problems = []
    for index, section in enumerate(config.techniques):
        technique: type[Technique] = TECHNIQUES.load(section.name)
        key = f"techniques[{index}]"
        needs = needs_of(section)
        if Need.BATCH_OVER_ONE in needs and largest_batch < 2:
            problems.append(
                Problem(
                    f"{section.name} compares the samples of a batch, and every batch has one",
                    key,
                    hint="set batch_size = 2 or more in the dataset, or remove the technique",
                )
            )
        distributed = config.distributed
        if Need.BASE_MODEL in needs and config.adapter.kind == "none":
            problems.append(
                Problem(
                    f"{section.name} asks the model as it was before training, and a full "
                    "fine-tune changes its weights",
                    key,
                    hint="train an adapter, or change the technique's options",
                )
            )
        if Need.FULL_GRADS in needs and (
            distributed.zero_stage > 1 or distributed.offload_optimizer != "none"
        ):
            problems.append(
                Problem(
                    f"{section.name} reads whole gradients, which ZeRO-2 and 3 cut into shards and "
                    "an offloaded optimizer takes away",
                    key,
                    hint="set distributed.zero_stage to 0 or 1, and offload_optimizer = 'none'",
                )
            )
        if distributed.sequence_parallel > 1 and _hooks_blocks(technique):
            problems.append(
                Problem(
                    f"{section.name} works on the tokens between the blocks, of which each process "
                    "has a part only",
                    key,
                    hint="set distributed.sequence_parallel = 1, or remove the technique",
                )
            )
    return problems


def needs_of(section: TechniqueSection) -> frozenset[Need]:
    """Return what a technique of the config requires of the run."""
    technique: type[Technique] = TECHNIQUES.load(section.name)
    return technique.needs_of(technique.Config(**section.options("name")))


def technique_texts(config: RunConfig, captions: Sequence[str]) -> tuple[str, ...]:
    """Return what techniques need encoded beside the captions of the dataset.

    Raises:
        ConfigError: a technique cannot work with these captions.
    """
    found: dict[str, None] = {}
    for index, section in enumerate(config.techniques):
        technique: type[Technique] = TECHNIQUES.load(section.name)
        try:
            found |= dict.fromkeys(
                technique.texts(technique.Config(**section.options("name")), captions)
            )
        except ConfigError as error:
            problem = Problem(error.message, f"techniques[{index}]", hint=error.hint)
            raise ConfigError(problems=[problem]) from None
    return tuple(found)


def mask_problems(config: RunConfig, *, masks: bool) -> list[Problem]:
    """Return why masks and techniques do not go together.

    Args:
        config: of the run.
        masks: some item that is trained on has one.
    """
    using = [index for index, one in enumerate(config.techniques) if Need.MASKS in needs_of(one)]
    if masks and not using:
        return [
            Problem(
                "the dataset has masks, and nothing uses them",
                "techniques",
                hint='add [[techniques]] with name = "masked_loss", or remove mask_directory and '
                "alpha_mask (in a list: mask_path)",
            )
        ]
    if masks:
        return []
    return [
        Problem(
            f"{config.techniques[index].name} works on masks, and no clip of the dataset has one",
            f"techniques[{index}]",
            hint="set mask_directory or alpha_mask of a source (in a list: mask_path)",
        )
        for index in using
    ]


def _hooks_blocks(technique: type[Technique]) -> bool:
    return technique.block_hooks is not Technique.block_hooks


def trained_transformer_files(config: RunConfig) -> tuple[Path, ...]:
    """Return the weight files that a run trains on: two where it trains both experts.

    Raises:
        ConfigError: one is not given.
    """
    fields = [
        "transformer_high_noise" if expert == "high_noise" else "transformer"
        for expert in trained_experts(config)
    ]
    files = []
    for field in fields or ["transformer"]:
        path: Path | None = getattr(config.model, field)
        if path is None:
            raise ConfigError(f"model.{field} is needed, but not given")
        files.append(path)
    return tuple(files)


def trained_transformer_file(config: RunConfig) -> Path:
    """Return the weight file that a run with one transformer trains on.

    Raises:
        ConfigError: none is given.
    """
    (path,) = trained_transformer_files(config)
    return path


def base_identity(config: RunConfig) -> str:
    """Return a fingerprint of what is trained on: the transformers' files and frozen adapters.

    Raises:
        ConfigError: there is no file.
        ModelFileError: a file cannot be read.
    """
    identity = "+".join(model_identity(path) for path in trained_transformer_files(config))
    experts = trained_experts(config) or (None,)
    frozen = companion_facts(
        tuple(one for expert in experts for one in config.adapter.companions(expert))
    )
    return digest([identity, *frozen]) if frozen else identity


def weights_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype of the transformer's activations, and of weights that are not fp8."""
    return torch.bfloat16 if is_fp8(config) else DTYPES[config.memory.weight_format]


def fp8_spec(config: RunConfig) -> Fp8Spec | None:
    """Return how the blocks' layers are held in fp8; None where they are not."""
    if not is_fp8(config):
        return None
    memory = config.memory
    return Fp8Spec(
        scaled=memory.weight_format == "fp8_scaled",
        dtype=FP8_FORMATS[memory.fp8_format],
        matmul=memory.fp8_matmul,
    )


def load_base(
    config: RunConfig,
    path: Path,
    *,
    expert: Expert | None,
    device: torch.device,
    share: HostShare | None = None,
) -> WanTransformer:
    """Load transformer weights in the precision that the config asks for, and what is on them.

    Args:
        config: the run.
        path: file or folder of the weights.
        expert: which one of Wan 2.2 they are, for the frozen adapters; None: no expert.
        device: where they compute.
        share: the processes of this machine that load the same weights now: of the blocks that
            are swapped they hold one copy, which the one that leads reads.

    Raises:
        ModelFileError: the file cannot be used, or is not what `model.variant` says.
        ConfigError: the file is in another fp8 format than asked for, or has fewer blocks than
            are to be swapped.
        RunError: the RAM for swapped blocks cannot be locked or shared.
    """
    from trainer.models import load_transformer

    def read(on: torch.device, held_elsewhere: HeldElsewhere | None) -> WanTransformer:
        return load_transformer(
            path,
            variant=config.model.variant,
            dtype=weights_dtype(config),
            device=on,
            config=dict(config.model.shape) or None,
            fp8=fp8_spec(config),
            held_elsewhere=held_elsewhere,
        )

    transformer = make_base(config, read, device=device, share=share)
    attach_companions(config, transformer, expert)
    return transformer


def make_base(
    config: RunConfig,
    weights: WeightsSource,
    *,
    device: torch.device,
    share: HostShare | None = None,
) -> WanTransformer:
    """Return a transformer of weights from anywhere, set up as `[memory]` says.

    Args:
        config: of the run.
        weights: makes the transformer, in `weights_dtype` and `fp8_spec` of the config.
        device: where it computes.
        share: as in `load_base`.

    Raises:
        ConfigError: it has fewer blocks than are to be swapped.
        RunError: the RAM for swapped blocks cannot be locked or shared.
    """
    num_streamed = config.memory.swapped_blocks
    # Streamed blocks never are on the device all at once, so it may be too small for them.
    place = torch.device("cpu") if num_streamed else device
    follows = share is not None and not share.leads
    transformer = weights(place, partial(spread, num_streamed) if follows else None)
    if config.distributed.zero_stage == 3:  # gathers weights from all processes
        hold_bytes(transformer)
    transformer.attend = ATTENTION.load(config.memory.attention)()
    transformer.gradient_checkpointing = config.memory.checkpointed_every
    transformer.blocks.keep_attention = config.memory.keep_attention
    transformer.set_feed_forward_chunks(config.memory.feed_forward_chunks)
    transformer.set_attention_chunks(config.memory.attention_chunks)
    if num_streamed or config.memory.offload_checkpoints:
        streams = streams_of(device)
        if num_streamed:
            _stream_blocks(transformer, num_streamed, streams, share)
        if config.memory.offload_checkpoints:
            transformer.blocks.offload = CheckpointOffload(streams)
    if config.memory.compile_blocks:
        for block in transformer.blocks:
            block.compile()
    return transformer


def _stream_blocks(
    transformer: WanTransformer, num: int, streams: Streams, share: HostShare | None
) -> None:
    problem = too_many_blocks(num, len(transformer.blocks))
    if problem is not None:
        raise ConfigError(problems=[problem])
    transformer.blocks.requires_grad_(requires_grad=False)
    transformer.blocks.swap = BlockSwap(list(transformer.blocks), num, streams, share=share)
    transformer.to(streams.device)


def pick_device(config: RunConfig, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    wanted = config.distributed.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "distributed.device is cuda, but torch sees no CUDA device",
            hint="`menma doctor` says why; device = 'cpu' works for tiny models",
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def num_processes(config: RunConfig) -> int:
    """Return how many training processes this machine shall run."""
    if config.distributed.num_processes is not None:
        return config.distributed.num_processes
    on_gpu = config.distributed.device != "cpu" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu and engine_kind(config) != "local" else 1


def engine_kind(config: RunConfig) -> Literal["deepspeed", "local"]:
    """Return the engine of this run; `auto` is DeepSpeed where it is installed."""
    if config.distributed.engine != "auto":
        return config.distributed.engine
    return "deepspeed" if is_installed() else "local"


def freeze(module: nn.Module) -> nn.Module:
    """Switch a module to evaluation without gradients; return it."""
    return module.eval().requires_grad_(requires_grad=False)
