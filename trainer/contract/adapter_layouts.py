"""Which layouts a kind of adapter can be written in: what `check` and the writer both go by."""

from __future__ import annotations

from trainer.contract.errors import Problem

TITLES = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
"""Stored kinds, as people write them."""
LAYOUTS_OF_KIND: dict[str, tuple[str, ...]] = {
    "lora": ("comfy", "kohya", "peft"),
    "dora": ("comfy", "kohya", "peft"),
    "loha": ("comfy", "kohya"),
    "lokr": ("comfy", "kohya"),
}
"""By stored kind. Kinds of `adapter.kind` that are not here write a LoRA."""


def layout_problem(kind: str, layout: str, key: str = "") -> Problem | None:
    """Return why a kind has no such layout, and what to use instead; None where it has."""
    if layout in LAYOUTS_OF_KIND.get(kind, LAYOUTS_OF_KIND["lora"]):
        return None
    return Problem(
        f"diffusers loads no {TITLES[kind]}, so there is no layout {layout!r} for it",
        key,
        hint='use "comfy" or "kohya", which ComfyUI loads, or merge it into the model '
        "(menma merge), which diffusers loads",
    )
