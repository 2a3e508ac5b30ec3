"""The VAE that the tests compare with."""

from __future__ import annotations

from trainer.models.wan.vae_config import VAEConfig


def reference_of(config: VAEConfig):
    """Return diffusers' class of this shape."""
    from diffusers import AutoencoderKLWan

    residual = {
        "decoder_base_dim": config.decoder_base_dim,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    }
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
        **(residual if config.version == "2.2" else {}),
    )
