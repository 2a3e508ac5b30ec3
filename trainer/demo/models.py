"""The embedded models: of Wan's architecture and in Wan's file layouts, but tiny.

The transformer and the text encoder are random. The VAE is fitted to the demo's clips for some
seconds, because the latents of a random VAE hardly depend on what is in the picture, and matching
them would show nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.contract.variants import TransformerConfig
from trainer.demo.clips import SCENES
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.tiny import tiny_vae_config, write_tiny_text_encoder
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import WanVAE, save_vae

VARIANT = "wan2.1-t2v-1.3b"
"""Whose channels and branches the tiny transformer has."""
TEXT_DIM = 64
_VAE_BASE_DIM = 8
_VAE_LEARNING_RATE = 3e-3
_LATENT_NOISE = 0.05
"""Standard deviation added to the latents while fitting, so that small errors stay small."""

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DemoModels:
    """Where the weight files are."""

    transformer: Path
    vae: Path
    text_encoder: Path


def transformer_config() -> TransformerConfig:
    """Return the shape of the tiny transformer: 325,216 parameters."""
    return TransformerConfig(
        dim=96, ffn_dim=192, num_heads=8, num_layers=2, text_dim=TEXT_DIM, freq_dim=64
    )


def write_models(
    folder: Path, videos: Sequence[Tensor], *, vae_steps: int, seed: int, on_step: OnStep
) -> DemoModels:
    """Make the models and write them in the layouts that ComfyUI uses.

    Args:
        folder: where the files go.
        videos: the clips, (3, F, H, W) in [-1, 1], for the VAE.
        vae_steps: how long the VAE is fitted.
        seed: of all weights.
        on_step: called with (steps done, steps in all) while the VAE is fitted.
    """
    models = DemoModels(
        transformer=folder / "transformer.safetensors",
        vae=folder / "vae.safetensors",
        text_encoder=folder / "text_encoder.safetensors",
    )
    transformer = WanTransformer(transformer_config(), seed=seed)
    transformer.variant_name = VARIANT
    save_transformer(transformer, models.transformer)
    captions = [scene.caption for scene in SCENES]
    write_tiny_text_encoder(models.text_encoder, captions, text_dim=TEXT_DIM, seed=seed)
    save_vae(fit_vae(torch.stack(list(videos)), vae_steps, seed, on_step), models.vae)
    return models


def fit_vae(videos_BCFHW: Tensor, num_steps: int, seed: int, on_step: OnStep) -> WanVAE:
    """Return a VAE that was trained to give these videos back.

    Its latent statistics are measured afterwards, as those of the released VAEs were: over the
    clips, each normalised channel has mean 0 and standard deviation 1.
    """
    vae = WanVAE.random(tiny_vae_config("2.1", _VAE_BASE_DIM), seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_VAE_LEARNING_RATE, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = _VAE_LEARNING_RATE * _course(step, num_steps)
        latents = vae.encode(videos_BCFHW)
        noise = torch.randn(latents.shape, generator=random)
        decoded = vae.decode(latents + _LATENT_NOISE * noise, clamp=False)
        loss = (decoded - videos_BCFHW).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        on_step(step + 1, num_steps)
    return _with_measured_statistics(vae, videos_BCFHW)


def _with_measured_statistics(vae: WanVAE, videos_BCFHW: Tensor) -> WanVAE:
    # The decoder was fitted behind other statistics; it takes the same raw latents as before.
    with torch.no_grad():
        mean_BCFHW, _ = vae.encode_moments(videos_BCFHW)
    rows = mean_BCFHW.transpose(0, 1).flatten(1)
    vae.config = replace(
        vae.config,
        latents_mean=tuple(rows.mean(dim=1).tolist()),
        latents_std=tuple(rows.std(dim=1).tolist()),
    )
    return vae.eval()


def _course(step: int, num_steps: int) -> float:
    """Warm-up of five steps, then half a cosine."""
    return min(1.0, (step + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
