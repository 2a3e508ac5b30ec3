"""Tensor names of Wan VAE files: the official names (ComfyUI's and Kijai's too) and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.contract.errors import ModelFileError
from trainer.io.mapped_load import TensorInfo, WeightFiles
from trainer.models.wan.vae_config import (
    RESIDUAL_BLOCKS,
    WIDTH_FACTORS,
    VAEConfig,
    VAEVersion,
    with_stored_statistics,
)

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_OUTER = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "decoder.head.0": "decoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.2": "decoder.conv_out",
}
_UP_BLOCKS = RESIDUAL_BLOCKS + 1


class VAELayout(NamedTuple):
    """How a file spells the names, and the shape of the VAE in it."""

    diffusers: bool
    prefix: str
    config: VAEConfig

    def file_name(self, name: str) -> str:
        """Return the file's name of the official tensor `name`."""
        return self.prefix + (to_diffusers(name, self.config.version) if self.diffusers else name)


def to_diffusers(name: str, version: VAEVersion) -> str:
    """Translate an official tensor name to that of diffusers' `AutoencoderKLWan`."""
    stem, _, leaf = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{leaf}"
    coder, _, rest = stem.partition(".")
    kind, _, rest = rest.partition(".")
    if kind == "middle":
        index, _, inner = rest.partition(".")
        block = f"mid_block.{_MIDDLE[index]}"
    elif version == "2.2":
        block, inner = _grouped_block(rest, down=kind == "downsamples")
    else:
        block, inner = _flat_block(rest, down=kind == "downsamples")
    return f"{coder}.{block}.{_RESIDUAL.get(inner, inner)}.{leaf}"


def _flat_block(rest: str, *, down: bool) -> tuple[str, str]:
    index, _, inner = rest.partition(".")
    if down:
        return f"down_blocks.{index}", inner
    group, place = divmod(int(index), _UP_BLOCKS + 1)
    layer = f"resnets.{place}" if place < _UP_BLOCKS else "upsamplers.0"
    return f"up_blocks.{group}.{layer}", inner


def _grouped_block(rest: str, *, down: bool) -> tuple[str, str]:
    match = re.fullmatch(r"(\d+)\.\w+\.(\d+)\.(.+)", rest)
    if match is None:
        raise ValueError(f"not a block of the Wan 2.2 VAE: {rest}")
    group, place, inner = match.groups()
    if down:
        layer = f"resnets.{place}" if int(place) < RESIDUAL_BLOCKS else "downsampler"
        return f"down_blocks.{group}.{layer}", inner
    layer = f"resnets.{place}" if int(place) < _UP_BLOCKS else "upsampler"
    return f"up_blocks.{group}.{layer}", inner


def recognise_vae(files: WeightFiles) -> VAELayout:
    """Tell layout, version and widths from names and shapes.

    Raises:
        ModelFileError: it is not a Wan VAE.
    """
    prefix, diffusers = _prefix(files)
    names = {
        name: prefix + (_OUTER[name] if diffusers else name) + ".weight"
        for name in ("encoder.conv1", "decoder.conv1", "conv2")
    }
    if not all(name in files for name in names.values()):
        raise _not_a_vae(files)
    config = with_stored_statistics(_shape(files, names), files.metadata, files.config)
    return VAELayout(diffusers, prefix, config)


def _shape(files: Mapping[str, TensorInfo], names: Mapping[str, str]) -> dict[str, Any]:
    encoder, decoder, latent = (
        files[names[name]].shape for name in ("encoder.conv1", "decoder.conv1", "conv2")
    )
    return {
        "version": "2.2" if encoder[1] == 12 else "2.1",
        "base_dim": encoder[0],
        "decoder_base_dim": decoder[0] // WIDTH_FACTORS[-1],
        "z_dim": latent[0],
    }


def _prefix(files: WeightFiles) -> tuple[str, bool]:
    for mark, diffusers in (
        ("decoder.middle.0.residual.0.gamma", False),
        ("decoder.mid_block.resnets.0.norm1.gamma", True),
    ):
        for name in files:
            if name.endswith(mark):
                return name.removesuffix(mark), diffusers
    raise _not_a_vae(files)


def _not_a_vae(files: WeightFiles) -> ModelFileError:
    if any(name.endswith("self_attn.q.weight") for name in files):
        hint = "it is a transformer; give the file of the VAE (Wan2.1_VAE.pth, wan_2.1_vae…)"
    else:
        hint = "give Wan2.1_VAE.pth, Wan2.2_VAE.pth, their ComfyUI copies or a diffusers vae folder"
    return ModelFileError(f"{files.path} is not a Wan VAE", hint=hint)
