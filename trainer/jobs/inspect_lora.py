"""What a LoRA file holds, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.adapters import load_adapter
from trainer.adapters.apply import describe
from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.difference import WeightDifference
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.layer_names import block_index
from trainer.contract.lora_keys import Expert
from trainer.contract.memory_model.weights import parameter_sizes
from trainer.contract.parameter_names import stored_name
from trainer.contract.variants import VARIANTS, TransformerConfig
from trainer.io.mapped_load import open_weights
from trainer.jobs.lora_files import inside_block, lora_file, parts_in
from trainer.jobs.lora_programs import programs_that_load


def inspect_lora(path: Path, *, expert: Expert | None = None) -> dict[str, Any]:
    """Return a summary of the LoRA in `path` that can be written as JSON.

    Keys: path, size_bytes, layout, metadata, notes, pair, and of the LoRA: kind, num_modules,
    num_parameters, ranks, alphas, scales and dtypes (value -> number of modules), blocks, modules
    (name inside the block -> how often), norm (Frobenius, of all updates together), norm_by_block
    (block, or `other` outside of them -> norm), largest (the five largest updates), zero_modules,
    differences (whole differences of parameters: `num`, `num_zero`, `norm`, and `names` inside the
    block -> how often; those of linear layers' weights are modules, too),
    model (what it fits, in words), variants (the released models it fits), expert, programs (who
    loads the file whole).

    Of a file with LoRAs for both experts of Wan 2.2, and without `expert`, `pair` has the keys of
    the LoRA once for `high_noise` and once for `low_noise`, and they are absent outside of it;
    else `pair` is None.

    Raises:
        ModelFileError: the file cannot be read as a LoRA.
    """
    told = parts_in(path)
    both = len(told) > 1
    names = list(open_weights(lora_file(path)))
    has_alpha = any(name.endswith(".alpha") for name in names)
    chosen = EXPERTS if both and expert is None else (expert,)
    parts: dict[Expert | None, AdapterFile] = {}
    summaries: dict[Expert | None, dict[str, Any]] = {}
    for part in chosen:
        parts[part] = load_adapter(path, expert=part, differences=True)
        summaries[part] = _summary(parts[part], part if both else next(iter(told), None))
        summaries[part]["programs"] = programs_that_load(
            parts[part], has_alpha=has_alpha, both_experts=both
        )
    first = next(iter(parts.values()))
    return {
        "path": str(path),
        "size_bytes": first.path.stat().st_size,
        "layout": "+".join(dict.fromkeys(adapter.layout for adapter in parts.values())),
        **(summaries[chosen[0]] if len(chosen) == 1 else {}),
        "pair": {name: summaries[name] for name in EXPERTS} if len(chosen) > 1 else None,
        "notes": list(dict.fromkeys(note for part in parts.values() for note in part.notes)),
        "metadata": first.metadata,
    }


def _summary(adapter: AdapterFile, expert: Expert | None) -> dict[str, Any]:
    whole = _whole(adapter)
    norms = {name: update.norm() for name, update in adapter.items()}
    largest = sorted(norms, key=lambda name: norms[name], reverse=True)[:5]
    updates = list(adapter.values())
    scaled = [update for update in updates if update.kind != WeightDifference.kind]
    kinds = {update.kind for update in updates} | ({WeightDifference.kind} if whole else set())
    return {
        "kind": "+".join(sorted(kinds)),
        "num_modules": len(adapter),
        "num_parameters": adapter.num_parameters,
        "ranks": _counts(update.rank for update in scaled),
        "alphas": _counts(f"{update.alpha:g}" for update in scaled),
        "scales": _counts(f"{update.scale:g}" for update in scaled),
        "dtypes": _counts(_dtype(update) for update in updates),
        "blocks": sorted({i for name in adapter if (i := block_index(name)) is not None}),
        "modules": _counts(inside_block(name) for name in adapter),
        "norm": sum(norm * norm for norm in norms.values()) ** 0.5,
        "norm_by_block": _by_block(norms),
        "largest": {name: norms[name] for name in largest},
        "zero_modules": sum(norm == 0 for norm in norms.values()),
        "differences": _differences(whole),
        "model": describe({name: update.shape for name, update in adapter.items()}),
        "variants": fitting_variants(adapter),
        "expert": expert or adapter.metadata.get("menma.expert"),
    }


def _whole(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return all whole differences by parameter, weights of linear layers among them."""
    weights = {
        f"{name}.weight": update.difference_OI
        for name, update in adapter.items()
        if isinstance(update, WeightDifference)
    }
    return weights | adapter.differences


def _differences(whole: Mapping[str, Tensor]) -> dict[str, Any]:
    norms = [float(tensor.double().norm()) for tensor in whole.values()]
    return {
        "num": len(whole),
        "num_zero": sum(norm == 0 for norm in norms),
        "norm": sum(norm * norm for norm in norms) ** 0.5,
        "names": _counts(inside_block(stored_name(name)) for name in whole),
    }


def _by_block(norms: Mapping[str, float]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, norm in sorted(norms.items(), key=lambda item: _block_order(item[0])):
        block = block_index(name)
        key = "other" if block is None else str(block)
        squares[key] = squares.get(key, 0.0) + norm * norm
    return {block: square**0.5 for block, square in squares.items()}


def _block_order(name: str) -> float:
    block = block_index(name)
    return float("inf") if block is None else block


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
    ) and (
        (config.image_dim is not None or not any(_is_image(name) for name in adapter))
        and _differences_fit(config, adapter)
    )


def _differences_fit(config: TransformerConfig, adapter: AdapterFile) -> bool:
    if not adapter.differences:
        return True
    sizes = parameter_sizes(config)
    return all(sizes.get(name) == t.numel() for name, t in adapter.differences.items())


def _shape(config: TransformerConfig, name: str) -> tuple[int, int] | None:
    dim, inner = config.dim, inside_block(name)
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


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
