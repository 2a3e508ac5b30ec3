"""Which variant a weight file is, told from its safetensors header; standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.variants import VARIANTS, Variant

_LARGEST_HEADER = 100 * 2**20
_FIRST_LAYER = "patch_embedding.weight"
_IMAGE_BRANCH = ("img_emb.", "image_embedder.")
_POSITIONS = (".emb_pos", ".pos_embed")


def variant_of_file(path: Path) -> Variant | None:
    """Return the released variant with the sizes of this file; None: it cannot be told.

    Variants of the same sizes take the same memory; the first of them is returned.

    Args:
        path: a safetensors file, or a folder of shards.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    header: dict[str, Any] = {}
    for file in files:
        header |= _read_header(file)
    layers = {str(name): layer for name, layer in header.items() if isinstance(layer, Mapping)}
    sizes = next(
        (layer.get("shape") for name, layer in layers.items() if name.endswith(_FIRST_LAYER)), None
    )
    if not isinstance(sizes, list) or len(sizes) < 2:
        return None
    image = any(part in name for name in layers for part in _IMAGE_BRANCH)
    positions = any(name.endswith(_POSITIONS) for name in layers)
    for variant in VARIANTS.values():
        shape = variant.transformer
        if (
            [shape.dim, shape.in_channels] == sizes[:2]
            and (shape.image_dim is not None) == image
            and shape.image_position_embedding == positions
        ):
            return variant
    return None


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
