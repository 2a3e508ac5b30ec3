"""How many parameters a transformer and its LoRA have, and the layers that LoRA goes on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from trainer.contract.loraid import LoraidOptions, partition_for
from trainer.contract.memory_model.block import Trained
from trainer.contract.variants import TransformerConfig

_ATTENTION = ("q", "k", "v", "o")


def block_linear_parameters(shape: TransformerConfig) -> int:
    """Return the elements of the matrices of a block's linear layers: what fp8 makes smaller."""
    return sum(i * o for i, o in block_layers(shape).values())


def block_other_parameters(shape: TransformerConfig) -> int:
    """Return the elements of a block's biases, norms and modulation."""
    dim = shape.dim
    biases = sum(outputs for _, outputs in block_layers(shape).values())
    norms = 4 * dim + 2 * dim + (dim if shape.image_dim else 0)
    return biases + norms + 6 * dim


def outer_parameters(shape: TransformerConfig) -> int:
    """Return the parameters outside the blocks."""
    dim, patch = shape.dim, math.prod(shape.patch_size)
    total = shape.in_channels * patch * dim + dim
    total += _linear(shape.text_dim, dim) + _linear(dim, dim)
    total += time_parameters(shape) + _linear(dim, 6 * dim)
    total += _linear(dim, shape.out_channels * patch) + 2 * dim
    if shape.image_dim:
        image = shape.image_dim
        total += 2 * image + _linear(image, image) + _linear(image, dim) + 2 * dim
        total += 2 * shape.image_tokens * image if shape.image_position_embedding else 0
    if shape.reference_conv:
        total += shape.out_channels * math.prod(shape.patch_size[1:]) * dim + dim
    return total


def time_parameters(shape: TransformerConfig) -> int:
    """Return the parameters of the time embedding, which stays float32."""
    return _linear(shape.freq_dim, shape.dim) + _linear(shape.dim, shape.dim)


def num_parameters(shape: TransformerConfig) -> int:
    """Return all parameters."""
    block = block_linear_parameters(shape) + block_other_parameters(shape)
    return shape.num_layers * block + outer_parameters(shape)


def block_layers(shape: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return a block's linear layers: name -> inputs, outputs."""
    dim, ffn = shape.dim, shape.ffn_dim
    names = [f"self_attn.{n}" for n in _ATTENTION] + [f"cross_attn.{n}" for n in _ATTENTION]
    if shape.image_dim:
        names += ["cross_attn.k_img", "cross_attn.v_img"]
    return {**dict.fromkeys(names, (dim, dim)), "ffn.0": (dim, ffn), "ffn.2": (ffn, dim)}


def outer_layers(shape: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return the linear layers outside the blocks that a LoRA may be put on."""
    dim = shape.dim
    layers = {
        "text_embedding.0": (shape.text_dim, dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (shape.freq_dim, dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (dim, 6 * dim),
        "head.head": (dim, shape.out_channels * math.prod(shape.patch_size)),
    }
    if shape.image_dim:
        layers |= {
            "img_emb.proj.1": (shape.image_dim, shape.image_dim),
            "img_emb.proj.3": (shape.image_dim, dim),
        }
    return layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is trained where."""

    blocks: tuple[Trained, ...]
    outer_parameters: int = 0
    """Of LoRAs outside the blocks."""
    first: int = 0
    """First block that something trained is in or in front of; their number where there is none."""


@lru_cache(maxsize=64)
def lora_targets(
    shape: TransformerConfig,
    rank: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    loraid: LoraidOptions | None = None,
) -> Targets:
    """Return what LoRA trains; patterns as in `trainer.adapters.targets.select_targets`.

    Raises:
        ConfigError: the slot does not fit the model.
    """
    layers = block_layers(shape)
    everywhere = Trained(rank=rank, targets=frozenset(layers))
    owned = _slot_layers(shape, loraid)
    if not include and not exclude and owned is None:
        return Targets(blocks=(everywhere,) * shape.num_layers)
    wanted, unwanted = _patterns(include), _patterns(exclude)
    blocks = []
    for index in range(shape.num_layers):
        targets = frozenset(
            name
            for name in layers
            if _matches(wanted, full := f"blocks.{index}.{name}") or not _matches(unwanted, full)
            if owned is None or full in owned
        )
        blocks.append(
            everywhere if targets == everywhere.targets else Trained(rank=rank, targets=targets)
        )
    outer = {
        name: rank * sum(sizes)
        for name, sizes in outer_layers(shape).items()
        if _matches(wanted, name)
    }
    first = next((i for i, block in enumerate(blocks) if block.something), len(blocks))
    return Targets(
        blocks=tuple(blocks),
        outer_parameters=sum(outer.values()),
        first=0 if outer.keys() - {"head.head"} else first,
    )


def _slot_layers(shape: TransformerConfig, loraid: LoraidOptions | None) -> frozenset[str] | None:
    """Return the names of the layers that a slot owns; None where there is no slot."""
    if loraid is None:
        return None
    image = shape.image_dim is not None
    partition = partition_for(loraid, num_blocks=shape.num_layers, image=image)
    return frozenset(partition.modules(loraid.slot))


def lora_parameters(shape: TransformerConfig, trained: Trained) -> int:
    """Return the LoRA's parameters in one block."""
    layers = block_layers(shape)
    return sum(trained.rank * sum(layers[name]) for name in trained.targets)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _patterns(texts: Sequence[str]) -> list[re.Pattern[str]]:
    found = []
    for text in texts:
        try:
            found.append(re.compile(text))
        except re.error:  # `menma check` and the trainer say what is wrong with it
            continue
    return found


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)
