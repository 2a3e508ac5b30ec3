"""Seeded miniatures of the VAE, the text encoder and the image encoder, for the demo and tests.

They are written in the layouts of the releases, so that the ordinary loaders read them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.contract.files import atomic_path, write_bytes, write_json
from trainer.io.atomic_save import save_safetensors
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.image_encoder import ImageEncoderConfig, build_clip_vision, original_source
from trainer.models.wan.text_encoder import TextEncoderConfig, build_umt5, to_original
from trainer.models.wan.vae import VAEConfig, WanVAE, save_vae
from trainer.models.wan.vae_config import VAEVersion

Layout = Literal["comfy", "official", "diffusers"]
"""One .safetensors file with Hugging Face's names; .pth with the official names; a folder."""


def tiny_vae_config(version: VAEVersion = "2.1", base_dim: int = 4) -> VAEConfig:
    """Return the shape of a VAE of the given version with few channels."""
    z_dim = 16 if version == "2.1" else 48
    return VAEConfig(version=version, base_dim=base_dim, decoder_base_dim=base_dim, z_dim=z_dim)


def write_tiny_vae(
    path: Path | str, version: VAEVersion = "2.1", *, base_dim: int = 4, seed: int = 0
) -> None:
    """Write an untrained VAE, official names in one safetensors file."""
    save_vae(WanVAE.random(tiny_vae_config(version, base_dim), seed), path)


def tiny_tokenizer(sentences: Sequence[str], normalization: str = "nmt_nfkc") -> bytes:
    """Return a sentencepiece model trained on `sentences`, special ids and fallback as in umT5.

    The same sentences give the same bytes on every run.

    Args:
        sentences: what it is trained on.
        normalization: sentencepiece's rule; "identity" saves 230 kB of tables for other scripts.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name=normalization,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tiny_text_encoder_config(num_pieces: int, text_dim: int = 32) -> TextEncoderConfig:
    """Return the shape of a two-layer umT5 for a tokenizer with `num_pieces` pieces."""
    return TextEncoderConfig(
        vocab_size=-(-num_pieces // 64) * 64,
        dim=text_dim,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        ffn_dim=2 * text_dim,
        num_buckets=8,
    )


def write_tiny_text_encoder(
    path: Path | str,
    sentences: Sequence[str],
    *,
    layout: Layout = "comfy",
    text_dim: int = 32,
    seed: int = 0,
) -> None:
    """Write an untrained umT5 with a tokenizer of its own.

    Args:
        path: the .safetensors file ("comfy"), .pth file ("official") or folder ("diffusers").
        sentences: what the tokenizer is trained on.
        layout: the tokenizer goes into the file, into `google/umt5-xxl/` beside it, or into
            `tokenizer/` beside the folder, as in the releases.
        text_dim: width of the context.
    """
    import sentencepiece

    path = Path(path)
    tokenizer = tiny_tokenizer(sentences)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    config = tiny_text_encoder_config(pieces, text_dim)
    model = build_umt5(config)
    init_fan_in(model, seed)
    tensors = dict(model.named_parameters())
    if layout == "comfy":
        spiece = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
        save_safetensors(tensors | {"spiece_model": spiece}, path)
    elif layout == "official":
        _save_torch({to_original(name): tensor for name, tensor in tensors.items()}, path)
        write_bytes(path.parent / "google/umt5-xxl/spiece.model", tokenizer)
    else:
        _save_folder(model, tensors, path)
        write_bytes(path.parent / "tokenizer/spiece.model", tokenizer)


def write_tiny_image_encoder(
    path: Path | str,
    *,
    layout: Layout = "comfy",
    image_dim: int = 80,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an untrained two-layer CLIP vision tower that gives 257 tokens.

    Args:
        path: the .safetensors file ("comfy"), .pth file ("official") or folder ("diffusers").
        layout: of the file, see `path`.
        image_dim: width of the features, a multiple of 80 (one head).
        seed: of the weights.
        dtype: of the file.
    """
    path = Path(path)
    config = ImageEncoderConfig(
        dim=image_dim, num_layers=2, num_heads=image_dim // 80, ffn_dim=2 * image_dim
    )
    model = build_clip_vision(config)
    init_fan_in(model, seed)
    tensors = dict(model.to(dtype).named_parameters())
    if layout == "comfy":
        save_safetensors({f"vision_model.{name}": t for name, t in tensors.items()}, path)
    elif layout == "official":
        _save_torch(_open_clip_tensors(tensors), path)
    else:
        _save_folder(model, tensors, path)


def _open_clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        target = original_source(name).name
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            joined[target] = torch.cat(parts)
        elif ".to_qkv." not in target:
            joined[target] = tensor
    joined["visual.cls_embedding"] = joined["visual.cls_embedding"].view(1, 1, -1)
    joined["visual.pos_embedding"] = joined["visual.pos_embedding"].unsqueeze(0)
    return joined


def _save_torch(tensors: Mapping[str, Tensor], path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save({name: tensor.detach().clone() for name, tensor in tensors.items()}, temporary)


def _save_folder(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    save_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", json.loads(model.config.to_json_string()))
