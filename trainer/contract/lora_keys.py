"""Takes one key of a LoRA file apart: which layer, which role, which expert."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trainer.contract.layer_names import canonical_from_flat, canonical_name, is_diffusers_name

Role = Literal["down", "up", "alpha"]
Expert = Literal["high_noise", "low_noise"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key that was understood.

    `spelling` is the module as the file spells it, without prefix: PEFT's patterns match that.
    `part` is the transformer the file names where it holds two (`transformer_2`), else "".
    """

    module: str
    role: Role
    layout: str
    spelling: str
    part: str


_FACTOR = re.compile(
    r"(?P<module>.+?)\."
    r"(?:(?P<down>lora_down|lora_A|lora\.down)|(?P<up>lora_up|lora_B|lora\.up))"
    r"(?:\.[^.]+)?\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_PARTS = re.compile(r"(?:diffusion_model\.)?(?P<part>transformer_[12])\.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer_1.",
    "transformer_2.",
    "transformer.",
    "module.",
    "model.",
)

UNSUPPORTED: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("LoHa", re.compile(r"\.hada_")),
    ("LoKr", re.compile(r"\.lokr_")),
    ("DoRA", re.compile(r"\.dora_scale|\.lora_magnitude_vector")),
    ("OFT", re.compile(r"\.b?oft_")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("(IA)³", re.compile(r"\.on_input$|\.ia3_l")),
    ("LoCon with a middle factor", re.compile(r"\.lora_mid\.")),
    ("LoRA with a bias", re.compile(r"\.lora_(?:A|B|up|down)(?:\.[^.]+)?\.bias$")),
    ("LoRA of an embedding", re.compile(r"\.lora_embedding_[AB]")),
    ("whole weights or differences of them", re.compile(r"\.(?:diff|diff_b|set_weight)$")),
    ("reshaped weights", re.compile(r"\.reshape_weight$")),
    ("trained norms", re.compile(r"\.[wb]_norm$")),
    ("text encoder LoRA", re.compile(r"^(?:lora_te|text_encoder)")),
    ("embedded tensors of textual inversion", re.compile(r"^bundle_emb\.")),
)
"""Kinds that are recognised, by what their keys look like, but not read."""


def parse_key(key: str) -> Key | None:
    """Return what `key` means, or None when it belongs to no known LoRA layout."""
    match = _FACTOR.fullmatch(key)
    role: Role = "alpha"
    if match is not None:
        role = "down" if match["down"] else "up"
    else:
        match = _ALPHA.fullmatch(key)
        if match is None:
            return None
    return _locate(match["module"], role)


def unsupported_kind(key: str) -> str | None:
    """Return the name of the adapter kind that writes such a key, if it is a known one."""
    return next((kind for kind, pattern in UNSUPPORTED if pattern.search(key)), None)


def _locate(name: str, role: Role) -> Key | None:
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            module = canonical_from_flat(flat)
            return None if module is None else Key(module, role, "kohya", flat, "")
    part = _PARTS.match(name)
    bare, comfy = _strip(name)
    module = canonical_name(bare)
    if module is None:
        return None
    layout = "peft" if is_diffusers_name(bare) else "comfy" if comfy else "bare"
    return Key(module, role, layout, bare, part["part"] if part else "")


def _strip(name: str) -> tuple[str, bool]:
    comfy = False
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
        comfy = comfy or prefix.endswith("diffusion_model.")
    return name, comfy
