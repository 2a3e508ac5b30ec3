"""One Wan transformer block and the modulation by time that it shares with the head.

Shape letters: B batch, L tokens, T text tokens, S image tokens, U distinct timesteps, D width,
P parts of a modulation (6 in a block, 2 in the head).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.base import AttentionBackend
from trainer.contract.variants import TransformerConfig
from trainer.models.wan.attention import CrossAttention, SelfAttention, add
from trainer.models.wan.kept import KeptResults
from trainer.models.wan.token_parts import in_parts

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class TimeModulation:
    """What the timestep adds to a modulation, float32.

    One row per sample while all tokens of a sample share a timestep; otherwise one row per
    distinct timestep and the row of every token. Never one row per token: at 720p those would be
    24 bytes per token and channel for a handful of distinct rows.
    """

    rows_UPD: Tensor
    row_BL: Tensor | None = None

    def at(self, kept_L: Tensor | None) -> TimeModulation:
        """Return the same for the tokens at the positions `kept_L`."""
        if kept_L is None or self.row_BL is None:
            return self
        return TimeModulation(self.rows_UPD, self.row_BL[:, kept_L])


class Modulation:
    """Shifts, scales and gates of one block or of the head, for one forward."""

    def __init__(self, learned_1PD: Tensor, time: TimeModulation, dtype: torch.dtype) -> None:
        self._rows_UPD = learned_1PD.float() + time.rows_UPD
        self._row_BL = time.row_BL
        self._dtype = dtype

    def part(self, index: int, span: slice = _ALL, *, plus_one: bool = False) -> Tensor:
        """Return part `index` (+ 1) as (B, 1, D), or (B, l, D) of `span` where tokens differ."""
        rows_UD = self._rows_UPD[:, index]
        rows_UD = ((1 + rows_UD) if plus_one else rows_UD).to(self._dtype)
        return rows_UD.unsqueeze(1) if self._row_BL is None else rows_UD[self._row_BL[:, span]]


def modulated_norm(tokens_BLD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, times `scale`, plus `shift`; both (B, 1, D) or (B, L, D)."""
    width = tokens_BLD.shape[-1:]
    if shift.shape[:2] == (1, 1):
        # The vector of a single sample is exactly what the fused kernel takes as its affine part.
        return F.layer_norm(tokens_BLD, width, scale[0, 0], shift[0, 0], eps)
    return torch.addcmul(shift, F.layer_norm(tokens_BLD, width, eps=eps), scale)


def gated_residual(tokens_BLD: Tensor, update_BLD: Tensor, gate: Tensor) -> Tensor:
    """Return tokens + gate · update; `gate` is (B, 1, D) or (B, L, D).

    Where no backward needs the update, the result is in its memory.
    """
    if not torch.is_grad_enabled() and update_BLD.dtype == tokens_BLD.dtype:
        return torch.addcmul(tokens_BLD, update_BLD, gate, out=update_BLD)
    if gate.requires_grad or gate.shape[1] != 1:
        return torch.addcmul(tokens_BLD, update_BLD, gate)
    return _frozen_gate(tokens_BLD, update_BLD, gate)


class _FrozenGate(torch.autograd.Function):
    """`addcmul` that hides its gate from checkpointing.

    A checkpointed block is recomputed until the last tensor that was saved for backward exists.
    Were the gate saved, the matrix product in front of it, the last of the feed-forward, would be
    recomputed only to be thrown away. So the gate, one vector a sample, is simply kept.
    """

    @staticmethod
    def forward(ctx: Any, tokens_BLD: Tensor, update_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
        ctx.gate_B1D = gate_B1D
        return torch.addcmul(tokens_BLD, update_BLD, gate_B1D)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        needed = ctx.needs_input_grad[1]
        return grad_BLD, grad_BLD * ctx.gate_B1D if needed else None, None


_frozen_gate = cast("Callable[..., Tensor]", _FrozenGate.apply)


@dataclass(frozen=True, slots=True)
class Start:
    """What the tokens in front of the first block were made of; text is not among it."""

    block: nn.Module
    given: tuple[Tensor | None, ...]
    layers: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What every block is given beside the tokens.

    `attend_to_tokens` is the attention among the video tokens, where it is not `attend`; `kept`
    has results of earlier forwards of the same video, `start` is for the first block.
    """

    time: TimeModulation
    rope_LK: Tensor
    context_BTD: Tensor
    context_bias_BT: Tensor | None
    image_BSD: Tensor | None
    attend: AttentionBackend
    attend_to_tokens: AttentionBackend | None = None
    kept: KeptResults | None = None
    start: Start | None = None

    def at(self, kept_L: Tensor | None) -> tuple[BlockInputs]:
        """Return the inputs for the tokens at the positions `kept_L` (None: all)."""
        if kept_L is None:
            return (self,)
        time, rope_LK = self.time.at(kept_L), self.rope_LK[kept_L]
        return (replace(self, time=time, rope_LK=rope_LK, start=None),)


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by time.

    Attributes:
        feed_forward_chunks: the feed-forward and its norm run over so many parts of the tokens,
            and each is recomputed in the backward: of its activations, the widest of all, only one
            part exists at a time. The result differs by no more than products of other sizes do.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, heads, self.eps = config.dim, config.num_heads, config.eps
        self.self_attn = SelfAttention(dim, heads, self.eps)
        self.norm3 = nn.LayerNorm(dim, self.eps)
        self.cross_attn = CrossAttention(dim, heads, self.eps, image=config.image_dim is not None)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.feed_forward_chunks = 1

    def forward(self, tokens_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        """Return the tokens after this block, (B, L, D)."""
        modulation = Modulation(self.modulation, inputs.time, tokens_BLD.dtype)
        tokens_BLD = self._attended(tokens_BLD, modulation, inputs)
        update = self.cross_attn(
            tokens_BLD,
            self.norm3,
            inputs.context_BTD,
            inputs.context_bias_BT,
            inputs.image_BSD,
            inputs.attend,
            None if inputs.kept is None else inputs.kept.keys_and_values,
        )
        tokens_BLD = add(update, tokens_BLD)
        feed = partial(self._feed_forward, modulation)
        (update,) = in_parts(feed, self.feed_forward_chunks, tokens_BLD)
        return gated_residual(tokens_BLD, update, modulation.part(5))

    def _attended(self, tokens_BLD: Tensor, modulation: Modulation, inputs: BlockInputs) -> Tensor:
        """Return the tokens behind self-attention."""

        def make() -> Tensor:
            norm = partial(self._norm, modulation, 0)
            attend = inputs.attend_to_tokens or inputs.attend
            update = self.self_attn(tokens_BLD, norm, inputs.rope_LK, attend)
            return gated_residual(tokens_BLD, update, modulation.part(2))

        start, starts = inputs.start, None if inputs.kept is None else inputs.kept.starts
        if starts is None or start is None or start.block is not self:
            return make()
        given, layers = (*start.given, self.modulation), (*start.layers, self.self_attn)
        return starts.get(given, layers, make, twice=True)

    def _norm(self, modulation: Modulation, first: int, tokens_BLD: Tensor, span: slice) -> Tensor:
        """Norm the tokens of `span`; shift and scale are parts `first` and the next one."""
        shift = modulation.part(first, span)
        scale = modulation.part(first + 1, span, plus_one=True)
        return modulated_norm(tokens_BLD, shift, scale, self.eps)

    def _feed_forward(
        self, modulation: Modulation, tokens_BLD: Tensor, span: slice
    ) -> tuple[Tensor]:
        normed_BLD = self._norm(modulation, 3, tokens_BLD, span)
        if torch.is_grad_enabled():
            return (self.ffn(normed_BLD),)
        widen, _, narrow = self.ffn
        return (narrow(torch.ops.aten.gelu_(widen(normed_BLD), approximate="tanh")),)
