"""What a weight file is, told from its safetensors header; standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.contract.variants import VARIANTS, TransformerConfig, Variant

_LARGEST_HEADER = 100 * 2**20
_FIRST_LAYER = "patch_embedding.weight"
_FEED_FORWARD = ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")
_IMAGE_BRANCH = ("img_emb.", "image_embedder.")
_POSITIONS = (".emb_pos", ".pos_embed")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_METADATA = "__metadata__"
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
    header = _header(path)
    told = VARIANTS.get(str(_metadata(header).get(_VARIANT_KEY)))
    if told is not None:
        return told
    sizes = _shape_of(header, (_FIRST_LAYER,))
    if sizes is None or len(sizes) < 2:
        return None
    names = [name for name in header if name != _METADATA]
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
    header = _header(path)
    first = _shape_of(header, (_FIRST_LAYER,))
    if first is None or len(first) < 2:
        return {}
    known = {field.name for field in fields(TransformerConfig)}
    try:
        written = json.loads(_metadata(header).get(_CONFIG_KEY, "{}"))
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


def _header(path: Path) -> Mapping[str, Any]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return _read_headers(tuple((file, *_state(file)) for file in files))


@lru_cache(maxsize=8)
def _read_headers(files: tuple[tuple[Path, int, int], ...]) -> Mapping[str, Any]:
    header: dict[str, Any] = {}
    for file, _, _ in files:
        header |= _read_header(file)
    return header


def _state(file: Path) -> tuple[int, int]:
    """Return what changes when a file is written anew."""
    try:
        stat = file.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _metadata(header: Mapping[str, Any]) -> Mapping[str, Any]:
    found = header.get(_METADATA)
    return found if isinstance(found, Mapping) else {}


def _shape_of(header: Mapping[str, Any], endings: tuple[str, ...]) -> list[int] | None:
    shapes: Iterator[Any] = (
        layer.get("shape")
        for name, layer in header.items()
        if name.endswith(endings) and isinstance(layer, Mapping)
    )
    shape = next(shapes, None)
    return shape if isinstance(shape, list) else None


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                return {}
            content = json.loads(stream.read(length))
    except (OSError, ValueError):  # not there, or no safetensors file
        return {}
    return content if isinstance(content, dict) else {}
