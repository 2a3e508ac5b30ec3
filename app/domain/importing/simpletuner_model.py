"""SimpleTuner's model, and how it is kept in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.tables import Keys
from trainer.contract.variants import VARIANTS

FLAVOURS: Mapping[str, tuple[str, str]] = {
    "t2v-480p-1.3b-2.1": ("wan2.1-t2v-1.3b", ""),
    "t2v-480p-14b-2.1": ("wan2.1-t2v-14b", ""),
    "t2v-720p-14b-2.1": ("wan2.1-t2v-14b", ""),
    "i2v-480p-14b-2.1": ("wan2.1-i2v-14b", ""),
    "i2v-720p-14b-2.1": ("wan2.1-i2v-14b", ""),
    "t2v-14b-2.2-high": ("wan2.2-t2v-a14b", "high_noise"),
    "t2v-14b-2.2-low": ("wan2.2-t2v-a14b", "low_noise"),
    "i2v-14b-2.2-high": ("wan2.2-i2v-a14b", "high_noise"),
    "i2v-14b-2.2-low": ("wan2.2-i2v-a14b", "low_noise"),
    "t2v-5b-2.2": ("wan2.2-ti2v-5b", ""),
    "ti2v-5b-2.2": ("wan2.2-ti2v-5b", ""),
}
"""`model_flavour` -> variant and expert."""
PATHS = ("pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path",
          "pretrained_vae_model_name_or_path", "pretrained_t5_model_name_or_path")  # fmt: skip
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def model(keys: Keys) -> None:
    """Variant, expert and weight files; what is a repository's name is one of the hub."""
    family = str(keys.get("model_family") or "wan").lower()
    if family not in {"wan", "wan_s2v"}:
        keys.lacks("model_family", f"Menma trains Wan, not {family}")
    else:
        keys.done("model_family", "model.variant says which Wan")
    variant, expert = _variant(keys)
    if variant:
        keys.put("model_flavour", "model.variant", variant)
        keys.draft.values["model.variant"] = variant
    else:
        keys.lacks("model_flavour", "Menma knows no such Wan", "set model.variant")
        keys.draft.notes.append("nothing says which Wan it is: set model.variant")
    if expert:
        keys.draft.values["model.expert"] = expert
    side = "model.transformer_high_noise" if expert == "high_noise" else "model.transformer"
    _weights(keys, side)
    if v.is_on(keys.get("wan_force_2_1_time_embedding")):
        keys.done("wan_force_2_1_time_embedding", "one vector a sample is used wherever it gives "
                  "the same")  # fmt: skip


def _variant(keys: Keys) -> tuple[str, str]:
    flavour = str(keys.get("model_flavour") or "").lower()
    if flavour in FLAVOURS:
        return FLAVOURS[flavour]
    name = str(keys.get("pretrained_model_name_or_path") or "").lower()
    for pattern, found in ((r"2\.2.*i2v", "wan2.2-i2v-a14b"), (r"2\.2.*5b", "wan2.2-ti2v-5b"),
                           (r"2\.2", "wan2.2-t2v-a14b"), (r"i2v", "wan2.1-i2v-14b"),
                           (r"1\.3b", "wan2.1-t2v-1.3b"), (r"14b", "wan2.1-t2v-14b")):  # fmt: skip
        if re.search(pattern, name):
            expert = "high_noise" if VARIANTS[found].experts else ""
            return found, expert
    return ("", "") if flavour or name else ("wan2.1-t2v-1.3b", "")


def _weights(keys: Keys, side: str) -> None:
    base = keys.get("pretrained_model_name_or_path")
    parts = {
        "pretrained_transformer_model_name_or_path": (side, "transformer"),
        "pretrained_vae_model_name_or_path": ("model.vae", "vae"),
        "pretrained_t5_model_name_or_path": ("model.text_encoder", "text_encoder"),
    }
    for key, (target, part) in parts.items():
        named = keys.get(key) or base
        if not isinstance(named, str) or not named:
            continue
        path, note = _folder(keys, named)
        if not path.endswith((".safetensors", ".pth")):
            path = f"{path}/{_subfolder(keys, part)}"
        if keys.get(key):
            keys.put(key, target, path, note=note or "the part of it that is meant")
        else:
            keys.draft.values[target] = path
    if isinstance(base, str) and base:
        path, note = _folder(keys, base)
        if not path.endswith((".safetensors", ".pth")):
            keys.draft.values["model.tokenizer"] = f"{path}/tokenizer"
            if _needs_image_encoder(keys):
                keys.draft.values["model.image_encoder"] = f"{path}/image_encoder"
        keys.done(PATHS[0], note or "its folders are named one by one", side)


def _needs_image_encoder(keys: Keys) -> bool:
    known = VARIANTS.get(str(keys.draft.chosen("model.variant")))
    return known is not None and known.transformer.image_dim is not None


def _subfolder(keys: Keys, part: str) -> str:
    # diffusers keeps the high-noise expert of Wan 2.2 in `transformer`, the other in `_2`.
    low = keys.draft.values.get("model.expert") == "low_noise"
    return "transformer_2" if low and part == "transformer" else part


def _folder(keys: Keys, name: str) -> tuple[str, str]:
    if _REPOSITORY.fullmatch(name) and not Path(name).exists():
        return f"hf:{name}", "`menma fetch` downloads it"
    return keys.weights_of(name)


def precision(keys: Keys) -> None:
    """Precision of the frozen weights."""
    word = str(keys.get("base_model_precision") or "no_change").lower()
    if word in {"no_change", "bf16", "none"}:
        keys.same("base_model_precision", "bf16, as in Menma")
    elif "fp8" in word:
        keys.put("base_model_precision", "memory.weight_format", "fp8_scaled",
                 note="fp8 with scales, of the blocks' linear layers")  # fmt: skip
    elif "int8" in word:
        keys.put("base_model_precision", "memory.weight_format", "fp8_scaled",
                 note="Menma has no int8; fp8 with scales is of the same size")  # fmt: skip
    else:
        keys.lacks("base_model_precision", f"Menma has no {word}",
                   'memory.weight_format = "fp8_scaled" is half of bf16')  # fmt: skip
    mixed = str(keys.get("mixed_precision") or "bf16").lower()
    if mixed == "bf16":
        keys.same("mixed_precision", "Menma computes in bf16")
    else:
        keys.done("mixed_precision", "Menma computes in bf16")


def memory(keys: Keys) -> None:
    """Recomputation and group offload, which is block swap here."""
    on = keys.read("gradient_checkpointing", v.flag, default=False)
    every = keys.read("gradient_checkpointing_interval", v.whole, 1)
    offload = v.is_on(keys.get("enable_group_offload"))
    value: Any = every if on and every and every >= 2 else on or offload
    keys.put("gradient_checkpointing", "memory.gradient_checkpointing", value)
    if on and every and every >= 2:
        keys.done("gradient_checkpointing_interval", "in gradient_checkpointing",
                  "memory.gradient_checkpointing")  # fmt: skip
    elif every == 1:
        keys.same("gradient_checkpointing_interval", "each block, as in Menma")
    if offload:
        keys.put(
            "enable_group_offload",
            "memory.blocks_to_swap",
            "auto",
            note="blocks wait in RAM and are copied one ahead; `auto`: as few as fit",
        )
    for key in keys.values:
        if key.startswith("group_offload_"):
            keys.done(key, "Menma swaps single blocks, with a stream of its own")
    if v.is_on(keys.get("enable_chunked_feed_forward")):
        chunks = keys.read("feed_forward_chunk_size", v.positive, 2)
        keys.put("enable_chunked_feed_forward", "memory.feed_forward_chunks", max(chunks, 2))
        keys.done("feed_forward_chunk_size", "the number of parts", "memory.feed_forward_chunks")


def attention(keys: Keys) -> None:
    """How attention is computed."""
    word = str(keys.get("attention_mechanism") or "diffusers").lower()
    names = {"diffusers": "sdpa", "xformers": "xformers", "flash-attn": "flash2",
             "flash-attn-2": "flash2", "flash-attn-3": "flash3", "flash-attn-3-varlen": "flash3",
             "flex": "flex", "cudnn": "sdpa"}  # fmt: skip
    if word in names:
        keys.put("attention_mechanism", "memory.attention", names[word])
    elif word.startswith("native"):
        keys.done("attention_mechanism", "torch picks its kernel")
    else:
        keys.lacks("attention_mechanism", f"{word} is not for training",
                   'memory.attention = "sage" is for `menma sample`')  # fmt: skip
