"""VAE, text encoder and image encoder of a config: who they are, and how to load them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.experts import boundary_of
from trainer.contract.variants import Variant, get_variant
from trainer.data.fingerprint import digest, model_identity
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.jobs.build import DTYPES
from trainer.jobs.window_encoder import LazyModel
from trainer.models import load_image_encoder, load_text_encoder, load_vae
from trainer.models.wan.detect import recognise
from trainer.models.wan.image_encoder import ImageEncoder, check_image_encoder
from trainer.models.wan.text_encoder import TextEncoder, check_text_encoder, check_tokenizer
from trainer.models.wan.vae import WanVAE
from trainer.models.wan.vae_keys import recognise_vae
from trainer.quant.fp8 import Fp8Spec


def settle_variant(config: RunConfig) -> Variant:
    """Return the variant, from the config or from the header of the transformer's weights.

    With the boundary between the experts that the config says.

    Raises:
        ConfigError: `auto`, and no transformer is given.
        ModelFileError: the weights cannot be read, or are not of the variant that is given.
    """
    model = config.model
    file = model.transformer if model.expert != "high_noise" else model.transformer_high_noise
    file = file or model.transformer or model.transformer_high_noise
    if file is not None and file.exists():
        name = recognise(open_weights(file), model.variant, dict(model.shape)).variant_name
        return _with_boundary(config, get_variant(name))
    if model.variant == "auto":
        raise ConfigError(
            "model.variant is auto, and there are no transformer weights to recognise it from",
            hint="set model.transformer, or name the variant",
        )
    return _with_boundary(config, get_variant(model.variant))


def _with_boundary(config: RunConfig, variant: Variant) -> Variant:
    return replace(variant, expert_boundary=boundary_of(config, variant))


def with_variant(config: RunConfig, variant: Variant) -> RunConfig:
    """Return the config with the variant that was settled in the place of `auto`."""
    model = config.model.model_copy(update={"variant": variant.name})
    return config.model_copy(update={"model": model})


def component(config: RunConfig, field: str) -> Path:
    """Return the file of `model.<field>`.

    Raises:
        ConfigError: it is not given.
    """
    path: Path | None = getattr(config.model, field)
    if path is None:
        raise ConfigError(f"model.{field} is needed, but not given")
    return path


def lazy_vae(config: RunConfig, variant: Variant, device: torch.device) -> LazyModel[WanVAE]:
    """Return the VAE, to be loaded when needed.

    Raises:
        ModelFileError: the file is no Wan VAE, or damaged.
        ConfigError: it is the VAE of other variants, or none is given.
    """
    path = component(config, "vae")
    require_vae(open_weights(path), variant)  # now, not after minutes of encoding captions

    def load() -> WanVAE:
        return load_vae(path, dtype=DTYPES[config.memory.vae_dtype], device=device)

    return LazyModel(model_identity(path), load)


def require_vae(files: WeightFiles, variant: Variant) -> None:
    """Refuse weights that are not the VAE of this variant; reads no more than their header.

    Raises:
        ModelFileError: they are no Wan VAE.
        ConfigError: they are the VAE of other variants.
    """
    version = recognise_vae(files).config.version
    if version != variant.vae:
        raise ConfigError(
            f"{files.path} is a VAE {version}, but {variant.name} works on the latents of "
            f"VAE {variant.vae}",
            hint="set model.vae to the other VAE",
        )


def lazy_text_encoder(config: RunConfig, device: torch.device) -> LazyModel[TextEncoder]:
    """Return the text encoder with its tokenizer, to be loaded when needed.

    Raises:
        ModelFileError: the file is no umT5, or damaged, or there is no tokenizer for it.
        ConfigError: none is given.
    """
    path, tokenizer = component(config, "text_encoder"), config.model.tokenizer
    files = open_weights(path)
    check_text_encoder(files)  # now, not after all clips were looked at
    check_tokenizer(files, tokenizer)

    where = text_encoder_device(config, device)

    def load() -> TextEncoder:
        return load_text_encoder(
            path,
            tokenizer=tokenizer,
            dtype=text_encoder_dtype(config),
            device=where,
            fp8=Fp8Spec(scaled=True) if _is_fp8_text(config) else None,
        )

    return LazyModel(text_encoder_identity(config, path), load)


def text_encoder_device(config: RunConfig, device: torch.device) -> torch.device:
    """Return where the text encoder works, while the other models work on `device`."""
    return torch.device("cpu") if config.memory.text_encoder_device == "cpu" else device


def text_encoder_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype that the text encoder computes in, and of its answers."""
    return torch.bfloat16 if _is_fp8_text(config) else DTYPES[config.memory.text_encoder_dtype]


def text_encoder_identity(config: RunConfig, path: Path) -> str:
    """Return the identity of the text encoder in `path`, with its tokenizer and its precision.

    bf16 is not named in it: so were identities before there was a choice of rounded weights.
    """
    identity, tokenizer = model_identity(path), config.model.tokenizer
    if tokenizer is not None:
        identity = digest([identity, model_identity(tokenizer)])
    if config.memory.text_encoder_dtype == "bf16":
        return identity
    return digest([identity, config.memory.text_encoder_dtype])


def _is_fp8_text(config: RunConfig) -> bool:
    return config.memory.text_encoder_dtype == "fp8_scaled"


def lazy_image_encoder(config: RunConfig, device: torch.device) -> LazyModel[ImageEncoder] | None:
    """Return the image encoder, to be loaded when needed; None where the config names none.

    Raises:
        ModelFileError: the file is no CLIP vision tower, or damaged.
    """
    path = config.model.image_encoder
    if path is None:
        return None
    check_image_encoder(open_weights(path))  # now, not after minutes of encoding captions

    def load() -> ImageEncoder:
        return load_image_encoder(path, dtype=DTYPES[config.memory.vae_dtype], device=device)

    return LazyModel(model_identity(path), load)
