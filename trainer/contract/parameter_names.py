"""Names of the parameters that a LoRA file may hold whole differences of.

A file says `<module>.diff` for the weight of a module, `<module>.diff_b` for its bias, and
`<parameter>.diff` for what is no weight of a module (`blocks.0.modulation`): the form that ComfyUI
reads. Canonical are the names of the original Wan code.
"""

from __future__ import annotations

import re

from trainer.contract.diffusers_names import to_original_name
from trainer.contract.errors import ModelFileError
from trainer.contract.layer_names import canonical_from_flat, canonical_name

DIFF, DIFF_B = "diff", "diff_b"
"""Roles, and endings of keys: the difference of a weight, of a bias."""

_BLOCK = re.compile(r"((?:blocks|vace_blocks)\.(?:0|[1-9][0-9]{0,3}))\.(.+)")
_FLAT_BLOCK = re.compile(r"(blocks|vace_blocks)_(0|[1-9][0-9]{0,3})_(.+)")
_BARE = frozenset({"modulation", "emb_pos"})
"""Parameters that are no weight of a module of their own."""
_NORMS = (
    "self_attn.norm_q",
    "self_attn.norm_k",
    "cross_attn.norm_q",
    "cross_attn.norm_k",
    "cross_attn.norm_k_img",
)
"""Norms without a bias."""
_IN_BLOCK = frozenset({*_NORMS, "norm3", "modulation"})
_OUTSIDE = frozenset(
    {"patch_embedding", "img_emb.proj.0", "img_emb.proj.4", "img_emb.emb_pos", "head.modulation"}
)
_FLAT_IN_BLOCK = {name.replace(".", "_"): name for name in _IN_BLOCK - _BARE}
_FLAT_OUTSIDE = {name.replace(".", "_"): name for name in ("patch_embedding", "img_emb.proj.0")} | {
    "img_emb_proj_4": "img_emb.proj.4"
}


def parameter_name(name: str, role: str) -> tuple[str, bool] | None:
    """Return the canonical parameter of a dotted name in front of `.diff` or `.diff_b`.

    Args:
        name: of a module, or of a parameter that is no module's weight; original or diffusers'.
        role: `DIFF` or `DIFF_B`.

    Returns:
        The parameter, and whether the name is spelt as in diffusers; None where there is no such.
    """
    linear = canonical_name(name)
    if linear is not None:
        return f"{linear}.{_leaf(role)}", linear != name
    for own, theirs in ((name, False), (_original(name), True)):
        if own is not None and _is_known(own):
            found = _parameter(own, role)
            return None if found is None else (found, theirs)
    return None


def parameter_from_flat(name: str, role: str) -> str | None:
    """Return the canonical parameter of a kohya-style name, dots written as underscores.

    What is no weight or bias of a module has no such name.
    """
    linear = canonical_from_flat(name)
    if linear is not None:
        return f"{linear}.{_leaf(role)}"
    match = _FLAT_BLOCK.fullmatch(name)
    if match is None:
        module = _FLAT_OUTSIDE.get(name)
    else:
        inner = _FLAT_IN_BLOCK.get(match[3])
        module = None if inner is None else f"{match[1]}.{match[2]}.{inner}"
    return None if module is None else _parameter(module, role)


def stored_name(parameter: str) -> str:
    """Return how a file without a prefix calls the difference: `blocks.0.norm3.diff_b`."""
    module, _, leaf = parameter.rpartition(".")
    if leaf in _BARE:
        return f"{parameter}.{DIFF}"
    return f"{module}.{DIFF if leaf == 'weight' else DIFF_B}"


def is_bare(parameter: str) -> bool:
    """Tell whether a parameter is no weight or bias of a module: a modulation, positions."""
    return parameter.rpartition(".")[2] in _BARE


def linear_of(parameter: str) -> str | None:
    """Return the linear layer whose weight or bias a parameter is, None where it is another's."""
    module = parameter.rpartition(".")[0]
    return module if canonical_name(module) == module else None


def _leaf(role: str) -> str:
    return "weight" if role == DIFF else "bias"


def _parameter(name: str, role: str) -> str | None:
    """Return the parameter of a known name that is no linear layer; None: it has no bias."""
    if name.rpartition(".")[2] in _BARE:
        return name if role == DIFF else None
    if role == DIFF_B and name.endswith(_NORMS):
        return None
    return f"{name}.{_leaf(role)}"


def _is_known(name: str) -> bool:
    match = _BLOCK.fullmatch(name)
    return name in _OUTSIDE if match is None else match[2] in _IN_BLOCK


def _original(name: str) -> str | None:
    try:
        return to_original_name(name)
    except ModelFileError:
        return None
