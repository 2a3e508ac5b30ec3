"""What a weight file is, told from its safetensors header; standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from trainer.contract.safetensors_header import METADATA, metadata_of, read_header
from trainer.contract.variants import VARIANTS, TransformerConfig, Variant

_FIRST_LAYER = "patch_embedding.weight"
_FEED_FORWARD = ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")
_IMAGE_BRANCH = ("img_emb.", "image_embedder.")
_POSITIONS = (".emb_pos", ".pos_embed")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_CONFIG_KEY, _VARIANT_KEY = "menma.config", "menma.variant"
"""Metadata that `trainer.models.wan.detect` writes; a test keeps the two equal."""


def variant_of_file(path: Path) -> Variant | None:
    """Return the variant of this file; None: it cannot be told.

    That is the one that Menma wrote into it, else the released one with the sizes of this file,
    else one with its channels and branches, whose sizes `sizes_of_file` tells. Variants of the same
    sizes take the same memory; the first of them is returned.

    Args:
        path: a safetensors file, or a folder of shards.
    """
    header = read_header(path)
    told = VARIANTS.get(str(metadata_of(header).get(_VARIANT_KEY)))
    if told is not None:
        return told
    sizes = _shape_of(header, (_FIRST_LAYER,))
    if sizes is None or len(sizes) < 2:
        return None
    names = [name for name in header if name != METADATA]
    image = any(part in name for name in names for part in _IMAGE_BRANCH)
    positions = any(name.endswith(_POSITIONS) for name in names)
    alike = [
        variant
        for variant in VARIANTS.values()
        if variant.transformer.in_channels == sizes[1]
        and (variant.transformer.image_dim is not None) == image
        and variant.transformer.image_position_embedding == positions
    ]
    return next((one for one in alike if one.transformer.dim == sizes[0]), next(iter(alike), None))


def sizes_of_file(path: Path) -> dict[str, Any]:
    """Return the fields of `TransformerConfig` that this file tells, {} where it is none.

    Of a file that Menma wrote these are all; else width, feed-forward width and blocks.

    Args:
        path: a safetensors file, or a folder of shards.
    """
    header = read_header(path)
    first = _shape_of(header, (_FIRST_LAYER,))
    if first is None or len(first) < 2:
        return {}
    known = {field.name for field in fields(TransformerConfig)}
    try:
        written = json.loads(metadata_of(header).get(_CONFIG_KEY, "{}"))
    except (TypeError, ValueError):  # loading the file says what is wrong with it
        written = {}
    if isinstance(written, dict) and written.keys() == known:
        return {**written, "patch_size": tuple(written["patch_size"])}
    found: dict[str, Any] = {"dim": first[0], "in_channels": first[1]}
    wide = _shape_of(header, _FEED_FORWARD)
    if wide:
        found["ffn_dim"] = wide[0]
    blocks = {match[1] for match in map(_BLOCK.search, header) if match}
    if blocks:
        found["num_layers"] = len(blocks)
    return found


def _shape_of(header: Mapping[str, Any], endings: tuple[str, ...]) -> list[int] | None:
    shapes: Iterator[Any] = (
        layer.get("shape")
        for name, layer in header.items()
        if name.endswith(endings) and isinstance(layer, Mapping)
    )
    shape = next(shapes, None)
    return shape if isinstance(shape, list) else None
