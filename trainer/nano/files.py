"""The shipped files: where they lie, and how trained weights become them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from trainer.io.atomic_save import save_safetensors
from trainer.models.wan.loading import save_transformer, transformer_metadata
from trainer.models.wan.transformer import WanTransformer

ASSETS: Final = Path(__file__).resolve().parent.parent / "assets" / "nano"
T2V_VARIANT: Final = "wan2.1-t2v-1.3b"
EXPERT_VARIANT: Final = "wan2.2-t2v-a14b"
I2V_VARIANT: Final = "wan2.1-fun-inp-1.3b"
"""Whose channels and branches the nano transformers have."""
MAX_BYTES: Final = 12_000_000
"""Of all files together."""
QUALITY: Final = "quality.json"
FILES: Final = {
    "t2v": "wan_nano_t2v.safetensors",
    "low_noise": "wan_nano_t2v_low_noise_fp8_scaled.safetensors",
    "high_noise": "wan_nano_t2v_high_noise_fp8_scaled.safetensors",
    "i2v": "wan_nano_i2v_fp8_scaled.safetensors",
    "vae": "wan_nano_vae.safetensors",
    "text_encoder": "umt5_nano.safetensors",
    "image_encoder": "clip_vision_nano.safetensors",
}
"""What the recipe makes -> file name. The derived transformers are fp8_scaled to stay small."""

_QUANTISED = re.compile(
    r"(blocks\.\d+\.(self_attn|cross_attn|ffn)\.[a-z0-9_]+|(text_embedding|time_projection)\.\d)\.weight"
)
_E4M3_MAX = 448.0


def asset(name: str) -> Path:
    """Return the path of a shipped file, by its key in `FILES`."""
    return ASSETS / FILES[name]


def save_bf16(model: WanTransformer, path: Path) -> None:
    """Write a transformer rounded to bfloat16."""
    save_transformer(model, path, dtype=torch.bfloat16)


def save_fp8_scaled(model: WanTransformer, path: Path) -> None:
    """Write a transformer as ComfyUI's fp8_scaled files are: e4m3 with one scale a row.

    Patch and time embedding, norms, biases, modulation and head stay bfloat16.
    """
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in model.state_dict().items():
        if _QUANTISED.fullmatch(name) and value.dim() == 2:
            scale_R = value.abs().amax(dim=1).clamp(min=1e-12) / _E4M3_MAX
            scaled = (value / scale_R[:, None]).clamp(-_E4M3_MAX, _E4M3_MAX)
            tensors[name] = scaled.to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "scale_weight"] = scale_R
        else:
            tensors[name] = value.bfloat16()
    save_safetensors(tensors, path, transformer_metadata(model.config, model.variant_name))
