"""Names of the linear layers that a LoRA may adapt, in the three spellings that files use.

Canonical are the names of the original Wan code (`blocks.3.self_attn.q`). Diffusers has its own
(`blocks.3.attn1.to_q`), kohya-style files replace every dot by an underscore.
"""

from __future__ import annotations

import re

from trainer.contract.diffusers_names import to_diffusers_name

_LINEARS_IN_BLOCK = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "cross_attn.k_img",
    "cross_attn.v_img",
    "ffn.0",
    "ffn.2",
)
_LINEARS_OUTSIDE = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "head.head",
)
_IN_BLOCK = {
    name: to_diffusers_name(f"blocks.0.{name}").removeprefix("blocks.0.")
    for name in _LINEARS_IN_BLOCK
}
_STACKS = {
    "blocks": _IN_BLOCK,
    "vace_blocks": {**_IN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"},
}
_OUTSIDE = {name: to_diffusers_name(name) for name in _LINEARS_OUTSIDE}

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
