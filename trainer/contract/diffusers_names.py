"""Names of the Wan transformer's tensors: official (canonical here) and diffusers.

The values are the same in both, nothing is transposed. Works for parameters
(`blocks.0.self_attn.q.weight`) and for modules (`blocks.0.self_attn.q`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from trainer.contract.errors import ModelFileError

MARKER = "condition_embedder.time_proj.weight"
"""A tensor that every diffusers file of the transformer has and no other layout."""

_EMBEDDER = "condition_embedder"
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
    "time_projection.1": f"{_EMBEDDER}.time_proj",
    "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
    "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
    "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
    "img_emb.emb_pos": f"{_EMBEDDER}.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_INSIDE = {
    "modulation": "scale_shift_table",
    # The second norm with weights; diffusers counts it as the block's second.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
} | {
    f"{ours}.{name}": f"{theirs}.{other}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for name, other in _ATTENTION.items()
}
_OUTSIDE_BACK = {other: name for name, other in _OUTSIDE.items()}
_INSIDE_BACK = {other: name for name, other in _INSIDE.items()}
_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")


def to_diffusers_name(original: str) -> str:
    """Return diffusers' name of a module or parameter that has the official name `original`.

    Raises:
        ModelFileError: diffusers has no such part (for example `ref_conv` of Fun-Control).
    """
    name = _translate(original, _OUTSIDE, _INSIDE)
    if name is None:
        raise ModelFileError(f"{original!r} has no counterpart in diffusers' Wan transformer")
    return name


def to_original_name(diffusers: str) -> str:
    """Return the official name of a module or parameter that diffusers calls `diffusers`.

    Raises:
        ModelFileError: it is no name of diffusers' Wan transformer.
    """
    name = _translate(diffusers, _OUTSIDE_BACK, _INSIDE_BACK)
    if name is None:
        raise ModelFileError(f"{diffusers!r} is no part of diffusers' Wan transformer")
    return name


def _translate(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _longest_prefix(name, outside)
    rest = _longest_prefix(block[2], inside)
    return None if rest is None else f"{block[1]}.{rest}"


def _longest_prefix(name: str, table: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:count]))
        if found is not None:
            return ".".join([found, *parts[count:]])
    return None
