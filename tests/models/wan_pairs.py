"""Tiny Wan transformers in pairs: Menma's and diffusers' with the same random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from trainer.contract.diffusers_names import to_diffusers_name, to_original_name
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.transformer import WanTransformer

TINY: dict[str, Any] = {
    "dim": 24,
    "ffn_dim": 48,
    "num_heads": 2,
    "num_layers": 2,
    "text_dim": 32,
    "freq_dim": 16,
}
GRID = (3, 4, 6)
"""Latent frames, height, width: 18 tokens."""
VIDEO_TOKENS = 18


def tiny_config(variant: str) -> TransformerConfig:
    """Return the shape of `variant` with all widths shrunk and its channels and branches kept."""
    full = VARIANTS[variant].transformer
    image: dict[str, Any] = {}
    if full.image_dim is not None:
        image = {"image_dim": 20, "image_tokens": 7}
    return replace(full, **TINY, **image)


def diffusers_options(config: TransformerConfig) -> dict[str, Any]:
    """Return the arguments that make diffusers build the same shape."""
    options: dict[str, Any] = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.image_dim,
    }
    if config.image_dim is not None:
        options["added_kv_proj_dim"] = config.dim
    if config.image_position_embedding:
        options["pos_embed_seq_len"] = 2 * config.image_tokens
    return options


def build(config: TransformerConfig, seed: int = 1) -> WanTransformer:
    """Return Menma's model with every parameter random, so that no term can hide behind a zero."""
    model = WanTransformer(config, seed=None)
    init_fan_in(model, seed)
    random = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(value, std=0.3, generator=random)
    return model


class ExactSinusoid(nn.Module):
    """Diffusers computes the angles of the timestep in float32; the original code in float64."""

    def forward(self, timestep: Tensor) -> Tensor:
        """Return (N, 16)."""
        half = TINY["freq_dim"] // 2
        frequencies = [10000 ** (-i / half) for i in range(half)]
        angles = torch.stack([timestep.double() * f for f in frequencies], dim=-1)
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).float()


def build_pair(
    config: TransformerConfig, *, exact_time: bool = True
) -> tuple[WanTransformer, WanTransformer3DModel]:
    """Return Menma's and diffusers' model with equal weights."""
    ours = build(config)
    theirs = WanTransformer3DModel(**diffusers_options(config))
    state = {
        to_diffusers_name(name): value
        for name, value in ours.state_dict().items()
        if not name.startswith("ref_conv")
    }
    theirs.load_state_dict(state, strict=True)
    if exact_time:
        theirs.condition_embedder.timesteps_proj = ExactSinusoid()
    return ours, theirs


@dataclass
class Inputs:
    """What one forward is given."""

    latents: Tensor
    timestep: Tensor
    texts: list[Tensor]
    extra: Tensor | None
    image: Tensor | None


def make_inputs(
    config: TransformerConfig, *, per_token: bool = False, lengths: tuple[int, ...] = (9, 30)
) -> Inputs:
    """Return seeded inputs for a batch with texts of `lengths`; gradients flow to the latents."""
    random = torch.Generator().manual_seed(11)
    batch = len(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    timestep = torch.tensor([873.25, 41.5, 600.0][:batch])
    if per_token:
        first = math.prod(GRID[1:]) // 4
        timestep = timestep[:, None].repeat(1, VIDEO_TOKENS)
        timestep[:, :first] = 0
    extra = config.in_channels - config.out_channels
    images = 2 if config.image_position_embedding else 1
    return Inputs(
        latents=draw(batch, config.out_channels, *GRID).requires_grad_(),
        timestep=timestep,
        texts=[draw(length, config.text_dim) for length in lengths],
        extra=draw(batch, extra, *GRID) if extra else None,
        image=None
        if config.image_dim is None
        else draw(batch, images * config.image_tokens, config.image_dim),
    )


def run_ours(model: WanTransformer, inputs: Inputs, **changes: Any) -> Tensor:
    """Call Menma's model."""
    given = {"extra_channels": inputs.extra, "image_context": inputs.image} | changes
    given = {name: value for name, value in given.items() if value is not None}
    return model(inputs.latents, inputs.timestep, inputs.texts, **given)


def padded(texts: list[Tensor], length: int = 512) -> Tensor:
    """Return the texts with zero rows up to `length`, (B, length, width)."""
    rows = torch.zeros(len(texts), length, texts[0].shape[1])
    for index, text in enumerate(texts):
        rows[index, : len(text)] = text
    return rows


def run_theirs(model: WanTransformer3DModel, inputs: Inputs) -> Tensor:
    """Call diffusers' model."""
    latents, image = inputs.latents, inputs.image
    if inputs.extra is not None:
        latents = torch.cat([latents, inputs.extra], dim=1)
    if image is not None and model.config.pos_embed_seq_len is not None:
        image = image.unflatten(1, (2, -1)).flatten(0, 1)
    return model(
        latents,
        inputs.timestep,
        padded(inputs.texts),
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]


def gradients(model: nn.Module, output: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every weight by official name, and of the latents."""
    random = torch.Generator().manual_seed(5)
    # A direction of about unit length, so that gradients are near unit size as outputs are.
    probe = torch.randn(output.shape, generator=random) / output.numel() ** 0.5
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((output * probe).sum(), [latents, *parameters])
    official = [n if isinstance(model, WanTransformer) else to_original_name(n) for n in names]
    return dict(zip(["latents", *official], found, strict=True))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((one - other).detach().abs().max())
