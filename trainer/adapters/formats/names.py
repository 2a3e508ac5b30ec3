"""Names of the linear layers that a LoRA may adapt, in the three spellings that files use.

Canonical are the names of the original Wan code (`blocks.3.self_attn.q`). Diffusers has its own
(`blocks.3.attn1.to_q`), kohya-style files replace every dot by an underscore.
"""

from __future__ import annotations

import re

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_IN_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_IN_VACE_BLOCK = {**_IN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}
_OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
_STACKS = {"blocks": _IN_BLOCK, "vace_blocks": _IN_VACE_BLOCK}

_BLOCK = re.compile(r"(blocks|vace_blocks)\.(0|[1-9][0-9]{0,3})\.(.+)")
_FLAT_BLOCK = re.compile(r"(blocks|vace_blocks)_(0|[1-9][0-9]{0,3})_(.+)")


def _both_spellings(table: dict[str, str]) -> dict[str, str]:
    return {name: ours for ours, theirs in table.items() for name in (ours, theirs)}


def _flat(table: dict[str, str]) -> dict[str, str]:
    return {name.replace(".", "_"): ours for name, ours in table.items()}


_READ = {stack: _both_spellings(table) for stack, table in _STACKS.items()}
_READ_OUTSIDE = _both_spellings(_OUTSIDE)
_READ_FLAT = {stack: _flat(table) for stack, table in _READ.items()}
_READ_FLAT_OUTSIDE = _flat(_READ_OUTSIDE)


def canonical_name(name: str) -> str | None:
    """Return the canonical name of a dotted module name (original or diffusers), or None."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _READ_OUTSIDE.get(name)
    stack, index, inner = match.groups()
    ours = _READ[stack].get(inner)
    return None if ours is None else f"{stack}.{index}.{ours}"


def canonical_from_flat(name: str) -> str | None:
    """Return the canonical name of a kohya-style name (dots written as underscores), or None.

    Underscores that belong to a name (`self_attn`, `k_img`) are told from dots by the table.
    """
    match = _FLAT_BLOCK.fullmatch(name)
    if match is None:
        return _READ_FLAT_OUTSIDE.get(name)
    stack, index, inner = match.groups()
    ours = _READ_FLAT[stack].get(inner)
    return None if ours is None else f"{stack}.{index}.{ours}"


def diffusers_name(canonical: str) -> str:
    """Return the diffusers spelling of a canonical name.

    Raises:
        KeyError: `canonical` is not the name of a known linear layer.
    """
    match = _BLOCK.fullmatch(canonical)
    if match is None:
        return _OUTSIDE[canonical]
    stack, index, inner = match.groups()
    return f"{stack}.{index}.{_STACKS[stack][inner]}"


def is_diffusers_name(name: str) -> bool:
    """Tell whether a dotted name is spelt the way diffusers does."""
    canonical = canonical_name(name)
    return canonical is not None and canonical != name


def block_index(canonical: str) -> int | None:
    """Return the index of the main block that a module belongs to, None outside of them."""
    match = _BLOCK.fullmatch(canonical)
    return int(match[2]) if match is not None and match[1] == "blocks" else None
