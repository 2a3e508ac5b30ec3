"""The memory of all blocks, one after the other, there and back: `trainer.models.block_stack`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from trainer.contract.memory_model.block import (
    BlockProfile,
    BlockShape,
    Trained,
    checkpointed_block,
    forward_only,
    plain_block,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """How activations are kept."""

    every: int = 1
    """Every so many blocks one is recomputed in the backward, from the first on; 0: none."""
    keep_attention: bool = False
    offload: bool = False
    """What is kept of recomputed blocks, their input, waits in host memory."""

    def recomputes(self, index: int, last: int) -> bool:
        """Return whether a block keeps only its input."""
        return bool(self.every) and index % self.every == 0 and index < last


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPeak:
    """The moment in which most is alive, in bytes; weights and the like not counted."""

    activations: float
    """Kept by blocks that are not in work."""
    gradients: float
    """Of blocks whose backward is done."""
    live_block: float
    """The block in work: its activations, its gradients, operators' temporaries."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.activations + self.gradients + self.live_block


@lru_cache(maxsize=64)  # weights and their place do not count, of which searches try many
def training_peak(
    shape: BlockShape,
    blocks: tuple[Trained, ...],
    options: StackOptions,
    *,
    first: int,
    drawn: float,
    head: float,
    gradient_share: float = 1.0,
) -> StackPeak:
    """Return the peak of a forward and its backward.

    Args:
        shape: sizes of a block.
        blocks: what is trained in each.
        options: what is kept.
        first: the first block that something trained is in or in front of; the number of blocks
            where there is none.
        drawn: bytes of noise and noisy latents, which the forward holds.
        head: bytes that head and loss take between the forward and the backward.
        gradient_share: how much of a block's gradients stays after its backward: 1, or less where
            they are handed over to other ranks.
    """
    tokens, last = shape.tokens_bytes, len(blocks) - 1
    modes = [
        _Mode(
            checkpointed=options.recomputes(index, last),
            offload=options.offload,
            keep_attention=options.keep_attention,
            idle=index < first,
            first=index == first and not blocks[index].front,
            chunked=shape.attention_chunks > 1,
        )
        for index in range(len(blocks))
    ]
    profiles = [_profile(shape, block, mode) for block, mode in zip(blocks, modes, strict=True)]
    peak = StackPeak(activations=0, gradients=0, live_block=0)
    kept, held = 0.0, 0.0
    for mode, profile in zip(modes, profiles, strict=True):
        peak = _larger(peak, kept, 0, held + tokens + drawn + profile.forward_peak)
        kept += profile.kept + (tokens if mode.keeps_input else 0)
        # A variable of the transformer's forward holds the first block's input.
        held = 0 if modes[0].keeps_input else tokens
    lowest_parked = next((i for i, mode in enumerate(modes) if mode.is_parked), len(modes))
    parked = tokens if lowest_parked < len(modes) else 0
    peak = _larger(peak, kept + parked + tokens, 0, head)
    gradients = 0.0
    for index, mode, profile in reversed(
        list(zip(range(len(modes)), modes, profiles, strict=True))
    ):
        if mode.idle:
            break
        kept -= profile.kept
        # Of what waits in host memory a block's own is here, and the next one arrives.
        back = tokens * (mode.is_parked + lowest_parked < index)
        peak = _larger(peak, kept + back, gradients, profile.backward_peak)
        gradients += profile.gradients * gradient_share
        kept -= tokens if mode.keeps_input else 0
    return peak


@lru_cache(maxsize=1024)
def forward_peak(shape: BlockShape) -> float:
    """Return the peak of a forward without gradients."""
    profile = forward_only(shape, Trained(), in_place=True)
    return 2 * shape.tokens_bytes + profile.forward_peak  # the first block's input is held, too


@dataclass(frozen=True, slots=True)
class _Mode:
    checkpointed: bool
    keep_attention: bool
    idle: bool
    """Nothing in it or in front of it is trained: nothing is kept."""
    first: bool
    """Nothing in front of it is trained: its input needs no gradient."""

    offload: bool
    chunked: bool = False
    """It keeps its input to make parts of itself again."""

    @property
    def is_parked(self) -> bool:
        """Whether the block's input waits in host memory."""
        return self.offload and self.checkpointed and not self.idle

    @property
    def keeps_input(self) -> bool:
        """Whether the block's input lives on, on the device, after its forward."""
        needed = self.checkpointed or self.chunked or not self.first
        return needed and not self.idle and not self.is_parked


_IDLE = _Mode(checkpointed=False, keep_attention=False, idle=True, first=False, offload=False)


@lru_cache(maxsize=1024)
def _profile(shape: BlockShape, trained: Trained, mode: _Mode) -> BlockProfile:
    if mode.idle:
        return forward_only(shape, trained)
    if mode.checkpointed:
        return checkpointed_block(
            shape, trained, keep_attention=mode.keep_attention, first=mode.first
        )
    return plain_block(shape, trained, first=mode.first)


def _larger(peak: StackPeak, activations: float, gradients: float, live: float) -> StackPeak:
    if activations + gradients + live <= peak.total:
        return peak
    return StackPeak(activations=activations, gradients=gradients, live_block=live)
