"""The Wan 2.1 / 2.2 video transformer.

Module names are those of the official releases, so that every file, adapter and tool agrees on
them. Sources: Wan technical report (arXiv:2503.20314) and the Wan-Video repositories; Fun models:
the VideoX-Fun repository. Parity with diffusers' independent implementation is tested to 2e-5.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width, L tokens,
T text tokens, S image tokens, U distinct timesteps, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from trainer.attention.base import AttentionBackend
from trainer.attention.sdpa import TorchAttention
from trainer.attention.sequence import SequenceGroup
from trainer.contract.errors import ConfigError, DataError
from trainer.contract.sequence_rules import uneven_heads
from trainer.contract.variants import TransformerConfig
from trainer.models.block_stack import BlockStack
from trainer.models.wan.block import (
    BlockInputs,
    Modulation,
    Start,
    TimeModulation,
    WanBlock,
    modulated_norm,
)
from trainer.models.wan.context import prepare_context
from trainer.models.wan.embeddings import (
    ImageEmbedding,
    PatchEmbedding,
    distinct_timesteps,
    sinusoid,
)
from trainer.models.wan.input_checks import check_conditioning, check_latents
from trainer.models.wan.kept import KeptResults
from trainer.models.wan.quantised import Quantisation
from trainer.models.wan.rope import rope_table

FLOAT32_MODULES = ("time_embedding",)
"""Kept in float32 whatever the dtype of the rest: its input spans 1000 steps, which bfloat16 cannot
tell apart, and it is 0.2 % of the 14B model. Norms and modulations are stored in the model's dtype
and computed in float32."""


class Head(nn.Module):
    """Modulated norm and projection from tokens to patches of velocity."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, tokens_BLD: Tensor, time: TimeModulation) -> Tensor:
        """Return (B, L, patch size · out_channels)."""
        part = Modulation(self.modulation, time, tokens_BLD.dtype).part
        normed = modulated_norm(tokens_BLD, part(0), part(1, plus_one=True), self.eps)
        patches: Tensor = self.head(normed)
        return patches


class WanTransformer(nn.Module):
    """Predicts velocity from noisy latents, timestep, text and optional conditioning.

    Attributes:
        config: the model's shape.
        variant_name: entry of `trainer.contract.variants.VARIANTS`, "" if of no released size.
        attend: computes all attention; exchange it for another backend.
        stored: reads a weight by name as it is in the file that the model was loaded from; None:
            there is no file.
        quantisation: what is known of the blocks' layers where they are fp8, else None.
        sequence: the processes that compute each clip together; None: this one alone does.
    """

    def __init__(self, config: TransformerConfig, *, seed: int | None = 0) -> None:
        """Build a model with fresh weights.

        Args:
            config: the shape.
            seed: of the initial weights; None leaves them unset for a loader to assign.

        Raises:
            ConfigError: the sizes do not fit one another.
        """
        _check_config(config)
        super().__init__()
        self.config = config
        self.variant_name = ""
        self.stored: Callable[[str], Tensor] | None = None
        self.attend: AttentionBackend = TorchAttention()
        self.quantisation: Quantisation | None = None
        self.sequence: SequenceGroup | None = None
        self._kept: KeptResults | None = None
        # Few: at 720p a table takes 40 MB. Own: a model on fake tensors keeps its to itself.
        self._rope_table = lru_cache(maxsize=4)(rope_table)
        dim = config.dim
        self.patch_embedding = PatchEmbedding(
            config.in_channels, dim, config.patch_size, config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.image_dim is not None:
            positions = 2 * config.image_tokens if config.image_position_embedding else None
            self.img_emb = ImageEmbedding(config.image_dim, dim, positions)
        if config.reference_conv:
            patch = config.patch_size[1:]
            self.ref_conv = nn.Conv2d(config.out_channels, dim, patch, patch)
        self.blocks = BlockStack(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if seed is not None:
            initialise(self, torch.Generator().manual_seed(seed))

    @property
    def gradient_checkpointing(self) -> bool | int:
        """Keep only block inputs for the backward and recompute the rest; k: of every k-th."""
        return self.blocks.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool | int) -> None:
        self.blocks.gradient_checkpointing = value

    def set_feed_forward_chunks(self, num: int) -> None:
        """Compute the blocks' feed-forward in `num` parts of the tokens (`WanBlock`)."""
        for block in self.blocks:
            cast(WanBlock, block).feed_forward_chunks = num

    def set_attention_chunks(self, num: int) -> None:
        """Make what enters attention in `num` parts of the tokens (`SelfAttention`)."""
        for block in self.blocks:
            cast(WanBlock, block).self_attn.chunks = num
            cast(WanBlock, block).cross_attn.chunks = num

    def share_tokens(self, sequence: SequenceGroup) -> None:
        """Compute each clip together with the other processes of a group from now on.

        All of them must be given the same input; all get the whole velocity.

        Raises:
            ConfigError: the heads cannot be dealt out evenly.
        """
        problem = uneven_heads(self.config.num_heads, sequence.size)
        if problem is not None:
            raise ConfigError(problems=[problem])
        self.sequence = sequence

    @contextmanager
    def remembering(self, *, passes_alike: bool) -> Iterator[None]:
        """Compute once what the forwards of one video have in common; to the last bit the same.

        That is embedded texts, images and timesteps, keys and values of cross-attention, and the
        first block's self-attention for the passes of one step. Only in evaluation mode without
        gradients. It takes memory: nothing is remembered where blocks are streamed or partitioned,
        where that is scarce, nor by compiled blocks.

        Args:
            passes_alike: forwards of a step differ in their text alone.
        """
        before, self._kept = self._kept, None
        if self.blocks.swap is None and not any(map(_is_compiled_or_partitioned, self.blocks)):
            self._kept = KeptResults(len(self.blocks), starts=passes_alike)
        try:
            yield
        finally:
            self._kept = before

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that tokens have between the blocks."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents_BCFHW: Tensor,
        timestep: Tensor,
        context: Tensor | Sequence[Tensor],
        *,
        extra_channels: Tensor | None = None,
        image_context: Tensor | None = None,
        reference: Tensor | None = None,
        frame_positions: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return the velocity, shaped as the latents and in their dtype.

        Args:
            latents_BCFHW: noisy latents.
            timestep: 1000·sigma, (B,), or (B, L) with one per token (frame by frame, row by row).
            context: text embeddings, (B, T, text_dim) or one (T_i, text_dim) per sample; zero rows
                up to `config.text_len` are added here.
            extra_channels: (B, C', F, H, W), put behind the latents on the channel axis.
            image_context: CLIP features (B, S, image_dim), S = 257; FLF2V 514, first then last.
            reference: latents (B, C, H, W) of a reference picture, for models with `ref_conv`.
            frame_positions: place in time of each patch of latent frames; None: 0, 1, 2, …

        Raises:
            DataError: something is missing, superfluous or of a shape that does not fit.
        """
        check_latents(self.config, latents_BCFHW, extra_channels)
        batch, _, *size = latents_BCFHW.shape
        f, h, w = (n // p for n, p in zip(size, self.config.patch_size, strict=True))
        check_conditioning(self.config, latents_BCFHW, timestep, context, image_context, reference)
        inputs = latents_BCFHW
        if extra_channels is not None:
            inputs = torch.cat((latents_BCFHW, extra_channels.to(latents_BCFHW)), dim=1)
        tokens_BLD = self.patch_embedding(inputs.to(self.dtype)).flatten(2).transpose(1, 2)
        if reference is not None:
            seen = self.ref_conv(reference.to(self.dtype)).flatten(2).transpose(1, 2)
            tokens_BLD = torch.cat((seen, tokens_BLD), dim=1)
            f += 1
        kept = None if self.training or torch.is_grad_enabled() else self._kept
        time_head, time_blocks = self._embed_time(timestep, kept)
        context_BTD, bias_BT = self._embed_text(context, kept)
        given = BlockInputs(
            time=time_blocks,
            rope_LK=self._rope((f, h, w), frame_positions, latents_BCFHW.device),
            context_BTD=context_BTD,
            context_bias_BT=bias_BT,
            image_BSD=None if image_context is None else self._embed_image(image_context, kept),
            attend=self.attend,
            kept=kept,
            start=None  # what is kept of a start does not know of positions
            if frame_positions
            else self._start(latents_BCFHW, timestep, extra_channels, reference),
        )
        shared = self.sequence
        if shared is not None:
            whole = tokens_BLD.shape[1]
            tokens_BLD, given, time_head = self._own_part(shared, tokens_BLD, given, time_head)
        tokens_BLD = self.blocks(tokens_BLD, given.at)
        first = 0 if reference is None else h * w
        if shared is None:
            patches = self.head(tokens_BLD[:, first:], time_head)
        else:
            patches = shared.gather(self.head(tokens_BLD, time_head), whole)[:, first:]
        return self._unpatch(patches.to(latents_BCFHW.dtype), batch, size)

    def time_features(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head (B, D) and the blocks (B, 6·D) are given of each timestep."""
        head, blocks = self._embed_time(timestep_B)
        return head.rows_UPD.flatten(1), blocks.rows_UPD.flatten(1)

    def _rope(
        self, grid: tuple[int, int, int], frames: tuple[int, ...] | None, device: torch.device
    ) -> Tensor:
        if frames is not None and len(frames) != grid[0]:
            raise DataError(f"{len(frames)} frame positions for {grid[0]} frames")
        return self._rope_table(grid, self.config.head_dim, self.config.rope_theta, device, frames)

    def _own_part(
        self,
        shared: SequenceGroup,
        tokens_BLD: Tensor,
        given: BlockInputs,
        time_head: TimeModulation,
    ) -> tuple[Tensor, BlockInputs, TimeModulation]:
        """Return this process's part of the tokens, and of what goes with each token."""
        num_tokens = tokens_BLD.shape[1]
        own_M = shared.positions(num_tokens, tokens_BLD.device)
        (own,) = given.at(own_M)
        own = replace(own, attend_to_tokens=shared.attention(self.attend, num_tokens))
        # A copy, so that the whole can be freed before the first block runs.
        return tokens_BLD.index_select(1, own_M), own, time_head.at(own_M)

    def _start(
        self,
        latents_BCFHW: Tensor,
        timestep: Tensor,
        extra_channels: Tensor | None,
        reference: Tensor | None,
    ) -> Start | None:
        if reference is not None or not self.blocks.as_given:
            return None
        layers = (self.patch_embedding, self.time_embedding, self.time_projection)
        return Start(self.blocks[0], (latents_BCFHW, timestep, extra_channels), layers)

    def _embed_time(
        self, timestep: Tensor, kept: KeptResults | None = None
    ) -> tuple[TimeModulation, TimeModulation]:
        def make() -> tuple[TimeModulation, TimeModulation]:
            rows_U, row_BL = distinct_timesteps(timestep)
            first = cast(nn.Linear, self.time_embedding[0])
            waves_UE = sinusoid(rows_U, self.config.freq_dim).to(first.weight.dtype)
            time_UD = self.time_embedding(waves_UE)
            parts_UE = self.time_projection(time_UD.to(self.dtype)).float()
            parts_UPD = parts_UE.unflatten(-1, (6, self.config.dim))
            rows_U1D = time_UD.float().unsqueeze(1)
            return TimeModulation(rows_U1D, row_BL), TimeModulation(parts_UPD, row_BL)

        if kept is None:
            return make()
        return kept.times.get((timestep,), (self.time_embedding, self.time_projection), make)

    def _embed_text(
        self, context: Tensor | Sequence[Tensor], kept: KeptResults | None
    ) -> tuple[Tensor, Tensor | None]:
        def make() -> tuple[Tensor, Tensor | None]:
            rows_BTD, bias_BT = prepare_context(
                context,
                self.config.text_len,
                self.config.text_dim,
                self.dtype,
                compact=self.attend.takes_bias,
            )
            return self.text_embedding(rows_BTD), bias_BT

        if kept is None:
            return make()
        given = (context,) if isinstance(context, Tensor) else tuple(context)
        return kept.texts.get(given, (self.text_embedding,), make)

    def _embed_image(self, image_BSE: Tensor, kept: KeptResults | None) -> Tensor:
        def make() -> Tensor:
            tokens_BSD: Tensor = self.img_emb(image_BSE.to(self.dtype))
            return tokens_BSD

        return make() if kept is None else kept.images.get((image_BSE,), (self.img_emb,), make)

    def _unpatch(self, patches_BLE: Tensor, batch: int, size: list[int]) -> Tensor:
        pf, ph, pw = self.config.patch_size
        f, h, w = size[0] // pf, size[1] // ph, size[2] // pw
        cells = patches_BLE.view(batch, f, h, w, pf, ph, pw, self.config.out_channels)
        return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, *size)


def initialise(model: WanTransformer, generator: torch.Generator) -> None:
    """Give `model` fresh weights: uniform Xavier linears, small embeddings, zero output.

    The scheme of the official code: velocity starts at zero, biases too.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d | nn.Conv2d):
            flat = module.weight.detach().flatten(1)
            nn.init.xavier_uniform_(flat, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WanBlock | Head):
            nn.init.normal_(module.modulation, std=model.config.dim**-0.5, generator=generator)
    for embedding in (model.text_embedding, model.time_embedding):
        for module in embedding:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
    if model.config.image_dim is not None and model.img_emb.emb_pos is not None:
        nn.init.zeros_(model.img_emb.emb_pos)
    nn.init.zeros_(model.head.head.weight)


def _check_config(config: TransformerConfig) -> None:
    if config.num_heads < 1 or config.dim % config.num_heads or config.head_dim % 2:
        raise ConfigError(
            f"width {config.dim} cannot be cut into {config.num_heads} heads of even size",
            hint="num_heads must divide dim into even parts",
        )
    if config.freq_dim % 2:
        raise ConfigError(f"freq_dim must be even, not {config.freq_dim}")


def _is_compiled_or_partitioned(block: nn.Module) -> bool:
    # ZeRO-3 gathers weights in an order that all processes must keep to.
    return block._compiled_call_impl is not None or any(
        hasattr(parameter, "ds_id") for parameter in block.parameters()
    )
