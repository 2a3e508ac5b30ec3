"""Memory of the text encoder, the VAEs and the image encoder.

The VAEs work through a video four frames at a time, so what they take grows with the area of a
frame (or tile) alone. The figures a pixel were counted on fake tensors of the real models
(`tests/memory`); cuDNN's workspaces for convolutions are not in them.
"""

from __future__ import annotations

from trainer.contract.memory_model.clips import Clip
from trainer.contract.variants import Variant

UMT5_PARAMETERS = 5_680_910_336
UMT5_LAYERS, UMT5_DIM, UMT5_FFN, UMT5_HEADS = 24, 4096, 10240, 64
UMT5_TABLE_PARAMETERS = 256_384 * UMT5_DIM
"""Of its embedding table, the largest tensor of all models."""
UMT5_LAYER_PARAMETERS = UMT5_PARAMETERS - UMT5_TABLE_PARAMETERS
CLIP_PARAMETERS = 632_076_800
CLIP_LAYERS, CLIP_DIM, CLIP_FFN, CLIP_TOKENS, CLIP_PATCH = 32, 1280, 5120, 257, 14

VAE_PARAMETERS = {"2.1": 126_892_531, "2.2": 704_688_668}
_PIXEL_BYTES = {
    # VAE, direction: bytes a pixel and byte of an element: one frame; more than one
    ("2.1", "encode"): (774.0, 3722.5),
    ("2.1", "decode"): (1440.5, 4692.75),
    ("2.2", "encode"): (369.0, 1734.4),
    ("2.2", "decode"): (1192.4, 4112.6),
}


def text_encoder_bytes(element: int) -> float:
    """Return the weights of umT5-XXL."""
    return UMT5_PARAMETERS * element


def fp8_text_encoder_bytes() -> float:
    """Return the weights of umT5-XXL with linear layers in fp8, a bf16 scale for each 64 inputs."""
    linear = UMT5_LAYERS * (4 * UMT5_DIM**2 + 3 * UMT5_DIM * UMT5_FFN)
    return linear * (1 + 2 / 64) + (UMT5_PARAMETERS - linear) * 2


def text_encoding_bytes(text_len: int, element: int) -> float:
    """Return what encoding a caption of full length takes; each caption runs alone."""
    attention = 2 * UMT5_HEADS * text_len**2 + 7 * text_len * UMT5_DIM
    feed_forward = text_len * (5 * UMT5_FFN + 2 * UMT5_DIM)
    return max(attention, feed_forward) * element


def vae_bytes(variant: Variant, element: int) -> float:
    """Return the weights of the variant's VAE."""
    return VAE_PARAMETERS[variant.vae] * element


def vae_work_bytes(
    variant: Variant, clip: Clip, direction: str, *, element: int, tile: int | None
) -> float:
    """Return what encoding or decoding takes beside the weights, tiled or whole."""
    width, height = clip.width, clip.height
    if tile is not None:
        width, height = min(width, tile), min(height, tile)
    per_pixel = _PIXEL_BYTES[variant.vae, direction][clip.num_frames > 1]
    latents = 4 * variant.latent_channels * clip.latent_frames(variant)
    latents = latents * clip.width * clip.height // variant.vae_stride[1] ** 2
    video = 0
    if tile is not None and direction == "decode":  # tiles are added up into the whole video
        video = 3 * 4 * clip.num_frames * clip.width * clip.height
    return width * height * per_pixel * element + 2 * latents + video


def image_encoder_bytes(variant: Variant, element: int) -> float:
    """Return the weights of CLIP ViT-H and what it takes for an image; 0 where none is used."""
    if variant.transformer.image_dim is None:
        return 0.0
    activations = CLIP_TOKENS * CLIP_DIM * 16 * 2 * element
    return CLIP_PARAMETERS * element + activations
