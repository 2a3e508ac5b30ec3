"""From a config to the numbers that the model works with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import is_fp8
from trainer.contract.errors import ConfigError
from trainer.contract.expert_turns import Turns
from trainer.contract.experts import boundary_of, known_turns, trains_both
from trainer.contract.hostfile import processes_here_of, world_size_of
from trainer.contract.memory_model.block import BlockShape
from trainer.contract.memory_model.clips import Clip, training_clips
from trainer.contract.memory_model.header import sizes_of_file, variant_of_file
from trainer.contract.memory_model.operators import Fp8
from trainer.contract.memory_model.optimizers import state_bytes
from trainer.contract.memory_model.trained import Targets, find_targets
from trainer.contract.memory_model.weights import (
    block_layers,
    block_linear_parameters,
    block_other_parameters,
    outer_parameters,
    time_parameters,
)
from trainer.contract.safetensors_header import tensor_shapes
from trainer.contract.variants import TransformerConfig, Variant, get_variant

SWAP_RING = 2
"""Buffers of block swap: one block computes while the next one arrives."""
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes an element."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One process's share of a training run."""

    config: RunConfig
    variant: Variant
    shape: TransformerConfig
    clip: Clip
    """The batch that takes most memory."""
    targets: Targets
    """What is trained."""
    world_size: int
    """Processes on all machines."""
    processes_here: int
    """Those on the machine that starts the run."""
    zero_stage: int
    swapped: int
    """Blocks whose frozen weights stay in host memory."""

    @property
    def full(self) -> bool:
        """Whether the model's own weights are trained."""
        return self.config.adapter.kind == "none"

    @cached_property
    def known_turns(self) -> Turns | None:
        """How two experts share the steps; None: one is trained, or only draws would tell."""
        if not trains_both(self.config):
            return None
        return known_turns(self.config, boundary_of(self.config, self.variant))

    @property
    def turns(self) -> Turns | None:
        """The same for the estimate; what is not known is half of the steps: most changes."""
        if not trains_both(self.config):
            return None
        group = self.config.experts.steps_per_turn
        return self.known_turns or Turns(steps_per_turn=group, high_noise_share=0.5)

    @property
    def adapters(self) -> int:
        """How many there are, each with an optimizer's state; one of them gets gradients."""
        return 2 if self.config.model.expert == "both" else 1

    @property
    def share_here(self) -> float:
        """This machine's part of what is dealt out to all processes."""
        return self.processes_here / self.world_size

    @cached_property
    def recomputed(self) -> int:
        """Blocks that run once more in the backward."""
        every, last = self.config.memory.checkpointed_every, self.shape.num_layers - 1
        return len(range(0, last, every)) if every else 0

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return 4 if self.config.memory.weight_format == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Video tokens of one sample."""
        return self.clip.tokens(self.variant)

    @property
    def sequence_ranks(self) -> int:
        """Processes that share the tokens of each clip."""
        return self.config.distributed.sequence_parallel

    @property
    def own_tokens(self) -> int:
        """Video tokens of one sample that this process works on."""
        return -(-self.tokens // self.sequence_ranks)

    @property
    def rows(self) -> int:
        """Video tokens of a batch that this process works on."""
        return self.clip.batch * self.own_tokens

    @property
    def latent_bytes(self) -> int:
        """Bytes of the batch's latents, float32."""
        cells = self.tokens * math.prod(self.shape.patch_size)
        return 4 * self.clip.batch * self.shape.out_channels * cells

    @cached_property
    def trained_parameters(self) -> int:
        """Parameters that get gradients."""
        return self.targets.parameters

    @cached_property
    def optimizer_state(self) -> float:
        """Bytes of the optimizer's state of one adapter, over all processes that share it."""
        section = self.config.optimizer
        return state_bytes(section.kind, section.options("kind"), self.targets.shapes)

    @property
    def average_bytes(self) -> int:
        """Bytes of the running average of the weights of one adapter."""
        return 4 * self.trained_parameters if self.config.ema.decay else 0

    @cached_property
    def companion_bytes(self) -> int:
        """Adapters on the base that are not trained, in the dtype of the activations."""
        return self.element * sum(
            math.prod(shape)
            for companion in self.config.adapter.companions(self.config.model.expert)
            for shape in tensor_shapes(companion.path).values()
        )

    @property
    def gradient_element(self) -> int:
        """Bytes of a gradient's element: that of the trained weights."""
        return self.element if self.full else 4

    @cached_property
    def block_bytes(self) -> float:
        """Weights of one block as they are kept."""
        shape = self.shape
        return (
            block_linear_parameters(shape) * (1 if self.fp8 else self.element)
            + self._scale_bytes
            + block_other_parameters(shape) * self.element
        )

    @property
    def weight_bytes(self) -> float:
        """All weights."""
        return self.shape.num_layers * self.block_bytes + self.outer_bytes

    @property
    def resident_bytes(self) -> float:
        """Weights that stay on the device."""
        return self.weight_bytes - self.swapped * self.block_bytes

    @property
    def ring_bytes(self) -> float:
        """Buffers that swapped blocks pass through."""
        return min(self.swapped, SWAP_RING) * self.block_bytes

    @property
    def _scale_bytes(self) -> float:
        """Scales of a block's fp8 weights: a bf16 for 64 inputs, or a float32 a row."""
        if self.config.memory.weight_format != "fp8_scaled":
            return 0.0
        layers = block_layers(self.shape).values()
        by_row = self.config.memory.fp8_matmul
        return sum(4.0 * o if by_row or i % 64 else i * o / 32 for i, o in layers)

    @cached_property
    def outer_bytes(self) -> float:
        """Weights outside the blocks."""
        wide = time_parameters(self.shape)
        return (outer_parameters(self.shape) - wide) * self.element + wide * 4

    @property
    def fp8(self) -> Fp8:
        """How the blocks multiply where their weights are fp8."""
        if not is_fp8(self.config):
            return None
        return "products" if self.config.memory.fp8_matmul else "dequantised"

    def under(self, config: RunConfig) -> Workload:
        """Return the same work under a config that differs from its own in `[memory]` only.

        Costs nothing: neither files nor the dataset are looked at again.
        """
        swapped = min(config.memory.swapped_blocks, self.shape.num_layers)
        other = replace(self, config=config, swapped=swapped)
        for name in ("trained_parameters", "optimizer_state"):  # `[memory]` changes none
            other.__dict__[name] = getattr(self, name)
        return other

    def block_shape(self, clip: Clip | None = None, *, ranks: int = 1) -> BlockShape:
        """Return the sizes of a block.

        Args:
            clip: what it works on; left out: this process's share of the training batch.
            ranks: processes that share the tokens of `clip`.
        """
        tokens = self.own_tokens if clip is None else -(-clip.tokens(self.variant) // ranks)
        clip, shape = clip or self.clip, self.shape
        images = 2 if shape.image_position_embedding else 1
        return BlockShape(
            dim=shape.dim,
            ffn_dim=shape.ffn_dim,
            heads=shape.num_heads,
            batch=clip.batch,
            tokens=tokens,
            text_tokens=shape.text_len,
            image_tokens=images * shape.image_tokens if shape.image_dim else 0,
            element=self.element,
            fp8=self.fp8,
            chunks=self.config.memory.feed_forward_chunks,
            attention_chunks=self.config.memory.attention_chunks,
        )


def workload_of(config: RunConfig, *, num_gpus: int = 1) -> Workload:
    """Return the numbers of a config.

    Args:
        config: checked.
        num_gpus: processes where neither a hostfile nor `distributed.num_processes` says it.

    Raises:
        ConfigError: the variant cannot be told, or the dataset cannot be read.
    """
    variant = variant_of(config)
    shape = shape_of(config, variant)
    clips = training_clips(config, variant)
    return Workload(
        config=config,
        variant=variant,
        shape=shape,
        clip=max(clips, key=lambda clip: clip.batch * clip.tokens(variant)),
        targets=find_targets(config, shape),
        world_size=world_size_of(config, num_gpus),
        processes_here=processes_here_of(config, num_gpus),
        zero_stage=config.distributed.zero_stage,
        swapped=min(config.memory.swapped_blocks, shape.num_layers),
    )


def shape_of(config: RunConfig, variant: Variant) -> TransformerConfig:
    """Return the shape of the transformer: the variant's, the file's where it tells, the config's.

    Args:
        config: names the file, and sizes that it does not tell.
        variant: the config's.
    """
    known = {field.name for field in fields(TransformerConfig)}
    file = _weight_file(config)
    told = {} if file is None else sizes_of_file(file)
    changed = {key: value for key, value in config.model.shape.items() if key in known}
    return replace(variant.transformer, **{**told, **changed})


def variant_of(config: RunConfig) -> Variant:
    """Return the config's variant; where it is `auto` the weight file's header tells.

    Raises:
        ConfigError: it does not.
    """
    model = config.model
    if model.variant != "auto":
        return get_variant(model.variant)
    path = _weight_file(config)
    found = None if path is None else variant_of_file(path)
    if found is None:
        raise ConfigError(
            "model.variant is auto, and the weight file does not tell which it is",
            hint='name it, e.g. --set model.variant="wan2.1-t2v-14b"',
        )
    return found


def _weight_file(config: RunConfig) -> Path | None:
    """Return the file that is trained, else the one that is given."""
    low, high = config.model.transformer, config.model.transformer_high_noise
    return (high or low) if config.model.expert == "high_noise" else (low or high)
