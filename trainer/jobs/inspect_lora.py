"""What a LoRA file holds, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.adapters import load_adapter
from trainer.adapters.apply import describe
from trainer.adapters.base import AdapterFile, Update
from trainer.contract.layer_names import block_index
from trainer.contract.lora_keys import Expert
from trainer.contract.variants import VARIANTS, TransformerConfig


def inspect_lora(path: Path, *, expert: Expert | None = None) -> dict[str, Any]:
    """Return a summary of the LoRA in `path` that can be written as JSON.

    Keys: path, size_bytes, kind, layout, num_modules, num_parameters, ranks, alphas, scales and
    dtypes (value -> number of modules), blocks, modules (name inside the block -> how often), norm
    (Frobenius, of all updates together), largest (the five largest updates), zero_modules,
    model (what it fits, in words), variants (the released models it fits), expert, notes, metadata.

    Raises:
        ModelFileError: the file cannot be read as a LoRA.
    """
    adapter = load_adapter(path, expert=expert)
    norms = {name: update.norm() for name, update in adapter.items()}
    largest = sorted(norms, key=lambda name: norms[name], reverse=True)[:5]
    updates = list(adapter.values())
    return {
        "path": str(path),
        "size_bytes": adapter.path.stat().st_size,
        "kind": "+".join(sorted({update.kind for update in updates})),
        "layout": adapter.layout,
        "num_modules": len(adapter),
        "num_parameters": sum(update.num_parameters for update in updates),
        "ranks": _counts(update.rank for update in updates),
        "alphas": _counts(f"{update.alpha:g}" for update in updates),
        "scales": _counts(f"{update.scale:g}" for update in updates),
        "dtypes": _counts(_dtype(update) for update in updates),
        "blocks": sorted({i for name in adapter if (i := block_index(name)) is not None}),
        "modules": _counts(_inside_block(name) for name in adapter),
        "norm": sum(norm * norm for norm in norms.values()) ** 0.5,
        "largest": {name: norms[name] for name in largest},
        "zero_modules": sum(norm == 0 for norm in norms.values()),
        "model": describe({name: factors.shape for name, factors in adapter.items()}),
        "variants": fitting_variants(adapter),
        "expert": adapter.metadata.get("menma.expert"),
        "notes": list(adapter.notes),
        "metadata": adapter.metadata,
    }


def fitting_variants(adapter: AdapterFile) -> list[str]:
    """Return the released models whose layers the LoRA fits.

    Experts of Wan 2.2, and models of equal blocks such as 2.1 and 2.2 text-to-video 14B, cannot be
    told apart by shapes.
    """
    return [v.name for v in VARIANTS.values() if _fits(v.transformer, adapter)]


def _fits(config: TransformerConfig, adapter: AdapterFile) -> bool:
    return all(
        _shape(config, name) in (None, factors.shape)
        and (block_index(name) or 0) < config.num_layers
        for name, factors in adapter.items()
    ) and (config.image_dim is not None or not any(_is_image(name) for name in adapter))


def _shape(config: TransformerConfig, name: str) -> tuple[int, int] | None:
    dim, inner = config.dim, _inside_block(name)
    if inner == "ffn.0":
        return config.ffn_dim, dim
    if inner == "ffn.2":
        return dim, config.ffn_dim
    return (dim, dim) if "_attn." in inner else None


def _is_image(name: str) -> bool:
    return name.startswith("img_emb.") or name.endswith(("k_img", "v_img"))


def _dtype(update: Update) -> str:
    first = next(iter(update.tensors().values()))
    return str(first.dtype).removeprefix("torch.")


def _inside_block(name: str) -> str:
    return name.split(".", 2)[2] if block_index(name) is not None else name


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
