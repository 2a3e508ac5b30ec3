"""Writes LoRA files in the layouts other programs read, and reads them back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.formats.peft_config import HEADER_KEY, header_settings
from trainer.adapters.formats.reader import load_adapter
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.layer_names import diffusers_name
from trainer.contract.registry import nearest
from trainer.io.atomic_save import same_bytes, save_safetensors

Layout = Literal["comfy", "kohya", "peft"]
Table = dict[str, Tensor]
Updates = Mapping[str, Update]
Factors = Mapping[str, LoRAFactors]


def save_adapter(
    updates: Updates,
    path: Path | str,
    *,
    layout: str = "comfy",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter and verify that reading it gives the same update again.

    Args:
        updates: by canonical module name.
        path: the file; one that is there is replaced only once the new one is verified.
        layout: `comfy` (`diffusion_model.…lora_A/B`, scale folded in: the one layout that both
            ComfyUI and diffusers load whole), `kohya` (`lora_unet_…`, with alpha) or `peft`
            (diffusers' names, scale in the header).
        dtype: of the factors in the file; they are rounded once, from what is given.
        metadata: of the header; what describes the tensors (ss_network_dim, ss_network_alpha,
            sshs_model_hash) is set here.

    Raises:
        ConfigError: no such layout.
        ModelFileError: a value does not fit `dtype`, or is not finite.
        DiskError: the disk is full, read-only or faulty.
    """
    if layout not in _WRITERS:
        raise ConfigError(f"unknown LoRA layout {layout!r}", hint=nearest(layout, _WRITERS))
    if not updates:
        raise ModelFileError(f"there is no module to write to {path}")
    prepare, write = _WRITERS[layout]
    stored = {name: _rounded(name, prepare(pair), dtype) for name, pair in _low_rank(updates)}
    tensors, header = write(stored)
    table = {**(metadata or {}), **_facts(stored), **header}
    table["sshs_model_hash"] = _model_hash(tensors)

    def check(file: Path) -> None:
        _check_equal(stored, load_adapter(file))

    save_safetensors(tensors, Path(path), table, check=check)


def _write_comfy(stored: Factors) -> tuple[Table, dict[str, str]]:
    return _pairs(stored, lambda name: f"diffusion_model.{name}.lora_A.weight", "lora_B"), {}


def _write_kohya(stored: Factors) -> tuple[Table, dict[str, str]]:
    def key(name: str) -> str:
        return f"lora_unet_{name.replace('.', '_')}.lora_down.weight"

    tensors = _pairs(stored, key, "lora_up")
    for name, pair in stored.items():
        tensors[key(name).replace(".lora_down.weight", ".alpha")] = torch.tensor(pair.alpha)
    return tensors, {"ss_network_module": "networks.lora_wan"}


def _write_peft(stored: Factors) -> tuple[Table, dict[str, str]]:
    tensors = _pairs(stored, lambda n: f"transformer.{diffusers_name(n)}.lora_A.weight", "lora_B")
    ranks = {diffusers_name(name): pair.rank for name, pair in stored.items()}
    alphas = {diffusers_name(name): pair.alpha for name, pair in stored.items()}
    return tensors, {HEADER_KEY: header_settings(ranks, alphas), "format": "pt"}


def _pairs(stored: Factors, down_key: Callable[[str], str], up: str) -> Table:
    tensors: Table = {}
    for name, pair in stored.items():
        key = down_key(name)
        stem = key.rsplit(".", 2)[0]
        tensors[key] = pair.down_RI
        tensors[f"{stem}.{up}.weight"] = pair.up_OR
    return tensors


def _low_rank(updates: Updates) -> Iterator[tuple[str, LoRAFactors]]:
    for name, update in updates.items():
        if not isinstance(update, LoRAFactors):
            raise TypeError(f"{name}: {type(update).__name__} has no file layout")
        yield name, update


def _unchanged(pair: LoRAFactors) -> LoRAFactors:
    return pair


_Prepare = Callable[[LoRAFactors], LoRAFactors]
_Write = Callable[[Factors], tuple[Table, dict[str, str]]]
_WRITERS: dict[str, tuple[_Prepare, _Write]] = {
    "comfy": (LoRAFactors.folded, _write_comfy),
    "kohya": (_unchanged, _write_kohya),
    "peft": (_unchanged, _write_peft),
}
LAYOUTS = tuple(_WRITERS)


def _rounded(name: str, pair: LoRAFactors, dtype: torch.dtype) -> LoRAFactors:
    down, up = (factor.detach().to("cpu", dtype) for factor in (pair.down_RI, pair.up_OR))
    if not all(bool(torch.isfinite(factor).all()) for factor in (down, up)):
        raise ModelFileError(
            f"the LoRA of {name} has values that {dtype} cannot hold, or NaN",
            hint="write bf16 or fp32; if that fails too, the training had diverged",
        )
    return LoRAFactors(down, up, pair.alpha)


def _facts(stored: Factors) -> dict[str, str]:
    # One figure where all modules agree; kohya-style tools write "Dynamic" where they do not.
    ranks = {pair.rank for pair in stored.values()}
    alphas = {pair.alpha for pair in stored.values()}
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def _model_hash(tensors: Table) -> str:
    # The hash that kohya-style tools and web sites identify a LoRA by: the file without header.
    content = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _check_equal(stored: Factors, read: Updates) -> None:
    if set(stored) != set(read):
        raise RuntimeError("the LoRA file that was written does not hold the same modules")
    pairs = dict(_low_rank(read))
    for name, pair in stored.items():
        back = pairs[name]
        same = same_bytes(pair.down_RI, back.down_RI) and same_bytes(pair.up_OR, back.up_OR)
        if not same or abs(pair.scale - back.scale) > 1e-6 * abs(pair.scale):
            raise RuntimeError(f"{name} differs in the LoRA file that was written")
