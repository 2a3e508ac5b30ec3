"""CLIP ViT-H/14, the image encoder of the 2.1 image-to-video models.

The network is transformers' `CLIPVisionModel`; names, files and preprocessing are handled here.

Shape letters: B batch, H/W pixels, L tokens (257: class token and 16 x 16 patches), D width (1280).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.contract.errors import DataError, ModelFileError
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.models.wan.component_weights import Placement, Source, fill

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_DIM = 80
"""Of ViT-H; the head count is in no file but diffusers' config.json."""

# The projection into the space shared with text, and the text tower, have no part in Wan.
_UNUSED = re.compile(r"textual\..*|log_scale|(visual\.)?head|.*position_ids|visual_projection\..*")

_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_OUTER = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "embeddings.position_embedding.weight": "pos_embedding",
    "pre_layrnorm.weight": "pre_norm.weight",
    "pre_layrnorm.bias": "pre_norm.bias",
    "post_layernorm.weight": "post_norm.weight",
    "post_layernorm.bias": "post_norm.bias",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEncoderConfig:
    """Shape of a CLIP vision tower. Defaults are those of ViT-H/14."""

    dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    ffn_dim: int = 5120
    patch_size: int = 14
    image_size: int = 224


def load_image_encoder(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ImageEncoder:
    """Load CLIP's vision tower.

    Args:
        path: Wan-AI's open-clip .pth (the text tower in it is not read), ComfyUI's
            clip_vision_h.safetensors, or diffusers' image_encoder folder.
        dtype: of weights and computation.

    Raises:
        ModelFileError: it is no such tower, or damaged.
    """
    files = open_weights(path)
    layout = _recognise(files)
    config = _config(files, layout)
    with torch.device("meta"):
        model = build_clip_vision(config)
    sources = {name: layout(name) for name, _ in model.named_parameters()}
    unused = {name for name in files if _UNUSED.fullmatch(name)}
    place = Placement(dtype, device)
    fill(model, files, sources, place, what="CLIP vision tower", ignore=unused)
    _materialise_buffers(model, device)
    return ImageEncoder(model.eval(), config)


def check_image_encoder(files: WeightFiles) -> None:
    """Refuse what cannot be CLIP's vision tower; reads no more than the header.

    Raises:
        ModelFileError: it is another model.
    """
    _config(files, _recognise(files))


class ImageEncoder:
    """CLIP's vision tower with its preprocessing; call it with images.

    Attributes:
        model: transformers' `CLIPVisionModel`, frozen.
        config: its shape.
    """

    def __init__(self, model: Any, config: ImageEncoderConfig) -> None:
        self.model = model
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight: Tensor = self.model.pre_layrnorm.weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the result."""
        weight: Tensor = self.model.pre_layrnorm.weight
        return weight.dtype

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the weights to `device`, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> Tensor:
        """Return the states after the last but one layer, (B, L, D), without the final norm.

        Args:
            images_B3HW: pixels in [-1, 1], any size, any float dtype, any device.

        Raises:
            DataError: the shape is another.
        """
        if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
            raise DataError(f"images are (batch, 3, height, width), not {tuple(images_B3HW.shape)}")
        pixels = preprocess(images_B3HW.to(self.device), self.config.image_size).to(self.dtype)
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        states: Tensor = output.hidden_states[-2]
        return states


def preprocess(images_B3HW: Tensor, size: int = 224) -> Tensor:
    """Squash to `size` x `size` and normalise, in float32; input in [-1, 1].

    Bicubic without antialiasing and without a crop: the models were trained with exactly this,
    Hugging Face's processor shows them the middle of the picture only.
    """
    squashed = F.interpolate(
        images_B3HW.float(), size=(size, size), mode="bicubic", align_corners=False
    )
    mean, std = (
        torch.tensor(values, device=squashed.device).view(1, 3, 1, 1) for values in (_MEAN, _STD)
    )
    return (squashed * 0.5 + 0.5 - mean) / std


def build_clip_vision(config: ImageEncoderConfig) -> Any:
    """Return transformers' CLIP vision tower of this shape, weights uninitialised."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
    )


def original_source(name: str, prefix: str = "visual.") -> Source:
    """Tell where a Hugging Face parameter is in the open-clip file, and what to do with it."""
    if name in _OUTER:
        change = _CHANGES.get(name)
        return Source(prefix + _OUTER[name], change)
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise ValueError(f"not a parameter of CLIP's vision tower: {name}")
    index, inner, leaf = match.groups()
    block = f"{prefix}transformer.{index}."
    if inner in _THIRDS:
        return Source(f"{block}attn.to_qkv.{leaf}", _third(_THIRDS[inner]))
    return Source(f"{block}{_BLOCK[inner]}.{leaf}")


def _third(index: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3, dim=0)[index]


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "embeddings.class_embedding": lambda tensor: tensor.flatten(),
    "embeddings.position_embedding.weight": lambda tensor: tensor.flatten(0, 1),
}


def _recognise(files: WeightFiles) -> Callable[[str], Source]:
    for prefix in ("visual.", ""):
        if f"{prefix}cls_embedding" in files:
            return lambda name: original_source(name, prefix)
    for prefix in ("vision_model.", ""):
        if f"{prefix}embeddings.class_embedding" in files:
            return lambda name: Source(prefix + name)
    raise ModelFileError(
        f"{files.path} is not a CLIP vision tower",
        hint="give models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, "
        "clip_vision_h.safetensors or an image_encoder folder",
    )


def _config(files: WeightFiles, layout: Callable[[str], Source]) -> ImageEncoderConfig:
    def shape(name: str) -> tuple[int, ...]:
        source = layout(name).name
        if source not in files:
            raise ModelFileError(f"{files.path} lacks {source}", hint="download it again")
        return files[source].shape

    dim = math.prod(shape("embeddings.class_embedding"))
    patch = shape("embeddings.patch_embedding.weight")[-1]
    positions = math.prod(shape("embeddings.position_embedding.weight")) // dim
    first = layout("encoder.layers.0.layer_norm1.weight").name
    stem, _, rest = first.partition("0.")
    layers = sum(name.startswith(stem) and name.endswith("." + rest) for name in files)
    return ImageEncoderConfig(
        dim=dim,
        num_layers=layers,
        num_heads=_num_heads(files, dim),
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight")[0],
        patch_size=patch,
        image_size=math.isqrt(positions - 1) * patch,
    )


def _num_heads(files: WeightFiles, dim: int) -> int:
    # A config.json beside a single file may be another model's.
    if "clip" in str(files.config.get("model_type")) and "num_attention_heads" in files.config:
        return int(files.config["num_attention_heads"])
    if dim % _HEAD_DIM:
        raise ModelFileError(
            f"{files.path} is a CLIP vision tower {dim} wide; Wan uses ViT-H, 1280 wide",
            hint="give clip_vision_h.safetensors",
        )
    return dim // _HEAD_DIM


def _materialise_buffers(model: Any, device: torch.device | str) -> None:
    # The only buffers are position ids, which no file has to hold.
    for name, buffer in dict(model.named_buffers()).items():
        owner, _, leaf = name.rpartition(".")
        ids = torch.arange(buffer.numel(), device=device).view(buffer.shape)
        setattr(model.get_submodule(owner), leaf, ids)
