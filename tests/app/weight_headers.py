"""Files with the header of a Wan model and nothing behind it: enough to be recognised."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.contract.variants import VARIANTS

VAE_SHAPES = {
    "2.1": {
        "decoder.middle.0.residual.0.gamma": [384, 1, 1, 1],
        "encoder.conv1.weight": [96, 3, 3, 3, 3],
    },
    "2.2": {
        "decoder.middle.0.residual.0.gamma": [1024, 1, 1, 1],
        "encoder.conv1.weight": [160, 12, 3, 3, 3],
    },
}
TEXT_SHAPES = {
    "spiece_model": [4_548_313],
    **{
        f"encoder.block.{index}.layer.0.SelfAttention.relative_attention_bias.weight": [32, 64]
        for index in range(2)
    },
}
IMAGE_SHAPES = {"vision_model.embeddings.class_embedding": [1280]}


def write_header(
    path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors header."""
    header: dict[str, object] = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def write_transformer(path: Path, variant: str, prefix: str = "") -> Path:
    """Write the header of a released transformer."""
    shape = VARIANTS[variant].transformer
    shapes = {f"{prefix}patch_embedding.weight": [shape.dim, shape.in_channels, 1, 2, 2]}
    for index in range(shape.num_layers):
        shapes[f"{prefix}blocks.{index}.ffn.0.weight"] = [shape.ffn_dim, shape.dim]
    if shape.image_dim:
        shapes[f"{prefix}img_emb.proj.1.weight"] = [1280, 1280]
    if shape.image_position_embedding:
        shapes[f"{prefix}img_emb.emb_pos"] = [1, 514, 1280]
    return write_header(path, shapes)


def write_parts(folder: Path, *, vae: str = "2.1", image_encoder: bool = False) -> None:
    """Write a VAE, a text encoder with its tokenizer, and if wanted an image encoder."""
    write_header(folder / f"wan_{vae}_vae.safetensors", VAE_SHAPES[vae])
    write_header(folder / "umt5_xxl_fp16.safetensors", TEXT_SHAPES)
    if image_encoder:
        write_header(folder / "clip_vision_h.safetensors", IMAGE_SHAPES)
