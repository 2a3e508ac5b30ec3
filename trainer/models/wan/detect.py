"""What a transformer file holds: layout, shape and variant, from names and shapes alone."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from trainer.contract.diffusers_names import MARKER, to_original_name
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.registry import nearest
from trainer.contract.variants import VARIANTS, TransformerConfig, get_variant
from trainer.io.formats.stored_tensors import StoredTensor, find_tensors
from trainer.io.mapped_load import WeightFiles

CONFIG_KEY = "menma.config"
VARIANT_KEY = "menma.variant"
"""Safetensors metadata that Menma writes: what shapes do not tell."""

_logger = logging.getLogger(__name__)
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "module.")
_BLOCK_NUMBER = re.compile(r"blocks\.(\d+)\.")
_ANCHOR = "patch_embedding.weight"
_STRAY = "norm_added_q"
"""Diffusers files may hold this norm of a query that no model has; diffusers ignores it as well."""

_OTHER_MODELS = {
    "casual_audio_encoder.encoder.final_linear.weight": "Wan 2.2 S2V",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan 2.2 Animate",
    "pose_patch_embedding.weight": "Wan 2.2 Animate",
    "vace_patch_embedding.weight": "Wan VACE",
    "control_adapter.conv.weight": "Wan Fun Camera",
}
_OTHER_FILES = {
    "decoder.middle.0.residual.0.gamma": "a Wan VAE",
    "quant_conv.weight": "a VAE of diffusers",
    "token_embedding.weight": "an umT5 text encoder",
    "shared.weight": "an umT5 text encoder",
    "visual.cls_embedding": "a CLIP image encoder",
    "vision_model.embeddings.class_embedding": "a CLIP image encoder",
}
_FROM_CONFIG_JSON = {
    "num_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "eps": "eps",
    "text_len": "text_len",
}


@dataclass(frozen=True, slots=True)
class TransformerFile:
    """A recognised transformer: its tensors by official name, its shape and its variant."""

    tensors: dict[str, StoredTensor]
    config: TransformerConfig
    variant_name: str


def recognise(
    weights: WeightFiles, variant: str = "auto", overrides: Mapping[str, Any] | None = None
) -> TransformerFile:
    """Find out what `weights` is.

    The variant follows from channels and the image branch, then from the size. What neither
    tells (2.1 T2V-14B or an expert of 2.2) is taken from metadata that Menma wrote, else the
    first fitting entry of `VARIANTS` is taken: Wan 2.1 before 2.2. A model of no released size
    gets the variant whose channels and branches it has.

    Args:
        weights: the opened file or folder.
        variant: a name of `VARIANTS` to insist on, or "auto".
        overrides: fields of `TransformerConfig` that the file does not tell.

    Raises:
        ModelFileError: not a transformer, one that Menma cannot train, or not `variant`.
        ConfigError: `variant` or a field of `overrides` does not exist.
    """
    tensors = official_tensors(weights)
    shapes = {name: weights[stored.name].shape for name, stored in tensors.items()}
    config = _read_config(weights, shapes, dict(overrides or {}))
    return TransformerFile(tensors, config, _choose_variant(weights, config, variant))


def official_tensors(weights: WeightFiles) -> dict[str, StoredTensor]:
    """Return the file's tensors by official name, whatever the layout.

    Raises:
        ModelFileError: it is no Wan transformer, or one of a kind Menma cannot train.
    """
    prefix = next((p for p in _PREFIXES if p + _ANCHOR in weights), None)
    if prefix is None:
        raise ModelFileError(
            f"{weights.path} is {_other_file(weights)}, not a Wan transformer",
            hint="give the file or folder of the transformer's weights",
        )
    foreign = [name for name in weights if not name.startswith(prefix)]
    if foreign:
        raise ModelFileError(
            f"{weights.path} holds more than a transformer, for example {foreign[0]!r}",
            hint="give a file with the transformer alone",
        )
    tensors = find_tensors(weights, prefix)
    for name, kind in _OTHER_MODELS.items():
        if name in tensors:
            raise ModelFileError(
                f"{weights.path} is {kind}, which Menma cannot train",
                hint=f"known models: {', '.join(VARIANTS)}",
            )
    if MARKER not in tensors:
        return tensors
    return {to_original_name(n): stored for n, stored in tensors.items() if _STRAY not in n}


def transformer_metadata(config: TransformerConfig, variant_name: str) -> dict[str, str]:
    """Return the safetensors metadata that make a file of this model recognisable for sure."""
    return {"format": "pt", CONFIG_KEY: json.dumps(asdict(config)), VARIANT_KEY: variant_name}


def _other_file(weights: WeightFiles) -> str:
    for name, kind in _OTHER_FILES.items():
        if name in weights:
            return kind
    if any(".lora_" in name for name in weights):
        return "a LoRA"
    return "an unknown file"


def _read_config(
    weights: WeightFiles, shapes: Mapping[str, tuple[int, ...]], overrides: dict[str, Any]
) -> TransformerConfig:
    measured = _measure(weights.path, shapes)
    told = _told_by_metadata(weights)
    if not told:
        told = _told_by_config_json(weights, measured)
    known = {field.name for field in fields(TransformerConfig)}
    for name in overrides:
        if name not in known:
            raise ConfigError(f"a transformer has no {name!r}", hint=nearest(name, known))
    for source in (told, overrides):
        for name, value in source.items():
            if name in measured and value != measured[name]:
                raise ModelFileError(
                    f"{weights.path}: {name} is {measured[name]} in the weights, not {value}"
                )
    values = measured | told | overrides
    if "num_heads" not in values:
        values["num_heads"] = _assumed_heads(weights.path, measured["dim"])
    return TransformerConfig(**values)


def _measure(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every field of the config that shapes tell."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None:
            raise ModelFileError(f"{path} lacks the tensor {name!r}", hint="it is incomplete")
        if len(found) != dims:
            raise ModelFileError(f"{path}: {name!r} has the shape {found}, {dims} axes are needed")
        return found

    dim, in_channels, *patch = shape(_ANCHOR, 5)
    empty = [name for name, sizes in shapes.items() if 0 in sizes]
    if empty:
        raise ModelFileError(f"{path}: {empty[0]!r} is empty", hint="the file is damaged")
    measured: dict[str, Any] = {
        "dim": dim,
        "in_channels": in_channels,
        "patch_size": tuple(patch),
        "out_channels": shape("head.head.weight", 2)[0] // math.prod(patch),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": _count_blocks(path, shapes),
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "image_dim": None,
        "image_position_embedding": "img_emb.emb_pos" in shapes,
        "reference_conv": "ref_conv.weight" in shapes,
    }
    if "img_emb.proj.0.weight" in shapes:
        measured["image_dim"] = shape("img_emb.proj.0.weight", 1)[0]
    if measured["image_position_embedding"]:
        measured["image_tokens"] = shape("img_emb.emb_pos", 3)[1] // 2
    return measured


def _count_blocks(path: Path, names: Iterable[str]) -> int:
    found = {m[1] for m in map(_BLOCK_NUMBER.match, names) if m}
    lacking = {str(index) for index in range(len(found))} - found
    if lacking:
        raise ModelFileError(
            f"{path} lacks block {min(lacking)}", hint="the file is incomplete or only a part"
        )
    return len(found)


def _told_by_metadata(weights: WeightFiles) -> dict[str, Any]:
    text = weights.metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{weights.path}: {CONFIG_KEY} is not valid JSON") from error
    known = {field.name: type(field.default) for field in fields(TransformerConfig)}
    if not isinstance(told, dict) or not set(told) <= set(known):
        raise ModelFileError(
            f"{weights.path}: {CONFIG_KEY} does not describe a transformer",
            hint="the file was written by another version of Menma, or damaged",
        )
    if isinstance(told.get("patch_size"), list):
        told["patch_size"] = tuple(told["patch_size"])
    for name in ("num_heads", "text_len", "image_tokens", "eps", "rope_theta"):
        if name in told and type(told[name]) not in {int, known[name]}:
            raise ModelFileError(f"{weights.path}: {CONFIG_KEY}: {name} is {told[name]!r}")
    return told


def _told_by_config_json(weights: WeightFiles, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` adds, if it belongs to these weights."""
    config = weights.config
    told = {ours: config[theirs] for theirs, ours in _FROM_CONFIG_JSON.items() if theirs in config}
    if not told:
        return {}
    width = config.get("dim") or told.get("num_heads", 0) * config.get("attention_head_dim", 0)
    same = width == measured["dim"] and config.get("num_layers") == measured["num_layers"]
    if same:
        return told
    if weights.path.is_dir():
        raise ModelFileError(
            f"{weights.path / 'config.json'} describes another model than the weights beside it",
            hint="the folder mixes two downloads",
        )
    _logger.info("%s: the config.json beside it is of another model", weights.path)
    return {}


def _assumed_heads(path: Path, dim: int) -> int:
    if dim % 128:
        raise ModelFileError(
            f"{path} does not tell its number of attention heads",
            hint='give it: config={"num_heads": …}; released models have width/128',
        )
    return dim // 128


def _choose_variant(weights: WeightFiles, config: TransformerConfig, asked: str) -> str:
    fitting = _fitting_variants(config)
    if asked != "auto":
        get_variant(asked)
        if asked not in fitting:
            what = " or ".join(fitting) or "no variant that Menma knows"
            raise ModelFileError(
                f"{weights.path} is {what} ({_describe(config)}), not {asked}",
                hint=f'set the variant to "{fitting[0]}" or "auto"' if fitting else "",
            )
        return asked
    if not fitting:
        raise ModelFileError(
            f"{weights.path} is a Wan transformer of no known variant: {_describe(config)}",
            hint=f"known models: {', '.join(VARIANTS)}",
        )
    written = weights.metadata.get(VARIANT_KEY)
    if written and written not in fitting:
        raise ModelFileError(
            f"{weights.path}: its metadata say {written}, its weights {' or '.join(fitting)}"
        )
    return written or fitting[0]


def _fitting_variants(config: TransformerConfig) -> list[str]:
    """Variants of this very size; if there are none, those of this kind."""
    kind = [variant for variant in VARIANTS.values() if _kind(variant.transformer) == _kind(config)]
    exact = [variant for variant in kind if _sizes(variant.transformer) == _sizes(config)]
    return [variant.name for variant in exact or kind]


def _kind(config: TransformerConfig) -> tuple[Any, ...]:
    image = config.image_dim is not None
    return config.in_channels, config.out_channels, image, config.image_position_embedding


def _sizes(config: TransformerConfig) -> TransformerConfig:
    # Fun-Control V1.1 is the same variant with one part more.
    return replace(config, reference_conv=False)


def _describe(config: TransformerConfig) -> str:
    image = ", CLIP branch" if config.image_dim is not None else ""
    return (
        f"width {config.dim}, {config.num_layers} blocks, {config.in_channels} channels in, "
        f"{config.out_channels} out{image}"
    )
