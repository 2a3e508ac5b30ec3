"""Takes one key of an adapter file apart: which layer, which role, which expert."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trainer.contract.layer_names import canonical_from_flat, canonical_name, is_diffusers_name
from trainer.contract.parameter_names import (
    DIFF,
    DIFF_B,
    linear_of,
    parameter_from_flat,
    parameter_name,
)
from trainer.contract.stored_kinds import STORED_KINDS, VERA_SHARED

ALPHA = "alpha"
SHARED = ""
"""The module of tensors that belong to all modules of a file."""
Expert = Literal["high_noise", "low_noise"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key that was understood.

    `spelling` is the module as the file spells it, without prefix: PEFT's patterns match that.
    `part` is the transformer the file names where it holds two (`transformer_2`), else "".
    `parameter` is what a whole difference belongs to (`blocks.0.norm3.weight`), else "".
    """

    module: str
    role: str
    layout: str
    spelling: str
    part: str
    parameter: str = ""

    @property
    def is_vector(self) -> bool:
        """Whether it is a whole difference of anything but the weight of a linear layer."""
        return bool(self.parameter) and (self.role != DIFF or linear_of(self.parameter) is None)


_ENDINGS = {
    role: re.compile(rf"(?P<module>.+?)\.{ending}")
    for role, ending in [
        *(pair for kind in STORED_KINDS.values() for pair in kind.endings.items()),
        (ALPHA, "alpha"),
    ]
}
_DIFFERENCE = re.compile(rf"(?P<name>.+?)\.(?P<role>{DIFF}|{DIFF_B})")
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
    ("LoHa of a convolution (Tucker form)", re.compile(r"\.hada_t[12]")),
    ("LoKr of a convolution (Tucker form)", re.compile(r"\.lokr_t[12]")),
    ("OFT", re.compile(r"\.b?oft_")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("(IA)³", re.compile(r"\.on_input$|\.ia3_l")),
    ("LoCon with a middle factor", re.compile(r"\.lora_mid\.")),
    ("LoRA with a bias", re.compile(r"\.lora_(?:A|B|up|down)(?:\.[^.]+)?\.bias$")),
    ("LoRA of an embedding", re.compile(r"\.lora_embedding_[AB]")),
    ("whole weights that replace the model's", re.compile(r"\.set_weight$")),
    ("reshaped weights", re.compile(r"\.reshape_weight$")),
    ("trained norms", re.compile(r"\.[wb]_norm$")),
    ("text encoder LoRA", re.compile(r"^(?:lora_te|text_encoder)")),
    ("embedded tensors of textual inversion", re.compile(r"^bundle_emb\.")),
)
"""Kinds that are recognised, by what their keys look like, but not read."""


def parse_key(key: str) -> Key | None:
    """Return what `key` means, or None when it belongs to no known layout of adapters."""
    difference = _DIFFERENCE.fullmatch(key)
    if difference is not None:
        return _locate_difference(difference["name"], difference["role"])
    for role, pattern in _ENDINGS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            return _locate(match["module"], role)
    shared = VERA_SHARED.fullmatch(key)
    return None if shared is None else Key(SHARED, shared["role"], "peft", "", "")


def unsupported_kind(key: str) -> str | None:
    """Return the name of the adapter kind that writes such a key, if it is a known one."""
    return next((kind for kind, pattern in UNSUPPORTED if pattern.search(key)), None)


def _locate(name: str, role: str) -> Key | None:
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


def _locate_difference(name: str, role: str) -> Key | None:
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            parameter = parameter_from_flat(flat, role)
            return None if parameter is None else _difference(parameter, role, "kohya", flat, "")
    part = _PARTS.match(name)
    bare, comfy = _strip(name)
    found = parameter_name(bare, role)
    if found is None:
        return None
    parameter, theirs = found
    layout = "peft" if theirs else "comfy" if comfy else "bare"
    return _difference(parameter, role, layout, bare, part["part"] if part else "")


def _difference(parameter: str, role: str, layout: str, spelling: str, part: str) -> Key:
    linear = linear_of(parameter)
    return Key(parameter if linear is None else linear, role, layout, spelling, part, parameter)


def _strip(name: str) -> tuple[str, bool]:
    comfy = False
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
        comfy = comfy or prefix.endswith("diffusion_model.")
    return name, comfy
