"""Writes adapter files in the layouts other programs read, and reads them back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.adapters.base import Update
from trainer.adapters.difference import WeightDifference
from trainer.adapters.formats.peft_config import HEADER_KEY, header_settings
from trainer.adapters.formats.reader import load_adapter
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.layer_names import diffusers_name
from trainer.contract.parameter_names import is_bare, stored_name
from trainer.contract.registry import nearest
from trainer.contract.stored_kinds import STORED_KINDS, StoredKind, layout_problem
from trainer.io.atomic_save import same_bytes, save_safetensors

Layout = Literal["comfy", "kohya", "peft"]
Table = dict[str, Tensor]
Updates = Mapping[str, Update]


def save_adapter(
    updates: Updates,
    path: Path | str,
    *,
    layout: str = "comfy",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
    differences: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter and verify that reading it gives the same update again.

    Args:
        updates: by canonical module name.
        path: the file; one that is there is replaced only once the new one is verified.
        layout: `comfy` (`diffusion_model.…lora_A/B`, scale folded in: the one layout that both
            ComfyUI and diffusers load whole), `kohya` (`lora_unet_…`, with alpha) or `peft`
            (diffusers' names, scale in the header; LoRA and DoRA only, and not both in one file).
        dtype: of the factors in the file; they are rounded once, from what is given. Magnitudes of
            DoRA are float32 always: their rounding would change whole rows of weights. Whole
            differences stay in the dtypes that they have.
        metadata: of the header; what describes the tensors (ss_network_dim, ss_network_alpha,
            sshs_model_hash) is set here.
        differences: of parameters that are no weights of linear layers, by canonical name.

    Raises:
        ConfigError: no such layout, not for this kind of adapter, or it has no name for a
            difference.
        ModelFileError: a value does not fit `dtype`, or is not finite.
        DiskError: the disk is full, read-only or faulty.
    """
    if layout not in _WRITERS:
        raise ConfigError(f"unknown LoRA layout {layout!r}", hint=nearest(layout, _WRITERS))
    vectors = dict(differences or {})
    if not updates and not vectors:
        raise ModelFileError(f"there is no module to write to {path}")
    _check_names(updates, vectors, layout, path)
    kinds = {name: _kind(name, update) for name, update in updates.items()}
    problems = {p for u in updates.values() if (p := layout_problem(u.kind, layout)) is not None}
    if problems:
        raise ConfigError(problems=sorted(problems, key=lambda problem: problem.message))
    prepare, write = _WRITERS[layout]
    stored = {name: _rounded(name, prepare(update), dtype) for name, update in updates.items()}
    tensors, header = write(stored, kinds)
    tensors |= _named(vectors, layout)
    if vectors and "ss_network_module" in header:
        header["ss_network_module"] = _LYCORIS
    table = {**(metadata or {}), **_facts(stored), **header}
    if "menma.kind" in table:
        own = {update.kind for update in updates.values()} or {WeightDifference.kind}
        table["menma.kind"] = "+".join(sorted(own))
    table["sshs_model_hash"] = model_hash(tensors)

    def check(file: Path) -> None:
        read = load_adapter(file, differences=True)
        _check_equal(stored, read)
        _check_differences(vectors, read.differences)

    save_safetensors(tensors, Path(path), table, check=check)


Kinds = Mapping[str, StoredKind]


def _write_comfy(stored: Updates, kinds: Kinds) -> tuple[Table, dict[str, str]]:
    return _tensors("comfy", stored, kinds, "diffusion_model.{}".format), {}


def _write_kohya(stored: Updates, kinds: Kinds) -> tuple[Table, dict[str, str]]:
    def stem(name: str) -> str:
        return f"lora_unet_{name.replace('.', '_')}"

    tensors = _tensors("kohya", stored, kinds, stem)
    for name, update in stored.items():
        if update.kind != WeightDifference.kind:  # it has none
            tensors[f"{stem(name)}.alpha"] = torch.tensor(update.alpha)
    modules = {kind.network_module for kind in kinds.values()}
    # LyCORIS's module reads every kind, so a mixture too.
    return tensors, {"ss_network_module": modules.pop() if len(modules) == 1 else _LYCORIS}


_LYCORIS = "lycoris.kohya"


def _check_names(updates: Updates, vectors: Table, layout: str, path: Path | str) -> None:
    """Refuse whole differences that a layout has no name for."""
    whole = [f"{n}.weight" for n, u in updates.items() if u.kind == WeightDifference.kind]
    bare = [name for name in vectors if is_bare(name)]
    none = {"peft": [*whole, *vectors], "kohya": bare}.get(layout, [])
    if none:
        others = "comfy" if bare else "comfy or kohya"
        raise ConfigError(
            f"{path}: layout {layout} has no name for {stored_name(none[0])}, a whole difference"
            + (f" ({len(none)} of them)" if len(none) > 1 else ""),
            hint=f"write layout {others}, or merge it into the model (menma merge)",
        )


def _named(vectors: Table, layout: str) -> Table:
    """Return differences by the keys that a layout has for them."""
    if layout == "comfy":
        return {f"diffusion_model.{stored_name(name)}": t for name, t in vectors.items()}
    table: Table = {}
    for name, tensor in vectors.items():
        module, _, role = stored_name(name).rpartition(".")
        table[f"lora_unet_{module.replace('.', '_')}.{role}"] = tensor
    return table


def _check_differences(stored: Table, read: Mapping[str, Tensor]) -> None:
    if stored.keys() != read.keys():
        raise RuntimeError("the LoRA file that was written does not hold the same differences")
    for name, tensor in stored.items():
        if not same_bytes(tensor, read[name]):
            raise RuntimeError(f"{name} differs in the LoRA file that was written")


def _write_peft(stored: Updates, kinds: Kinds) -> tuple[Table, dict[str, str]]:
    dora = {name for name, update in stored.items() if update.kind == "dora"}
    if dora and len(dora) < len(stored):
        raise ConfigError(
            f"diffusers takes all modules of a file for DoRA or none; {min(dora)} is one and "
            f"{min(stored.keys() - dora)} is not",
            hint='write layout "comfy" or "kohya"',
        )
    tensors = _tensors("peft", stored, kinds, lambda name: f"transformer.{diffusers_name(name)}")
    ranks = {diffusers_name(name): update.rank for name, update in stored.items()}
    alphas = {diffusers_name(name): update.alpha for name, update in stored.items()}
    settings = header_settings(ranks, alphas, use_dora=bool(dora))
    return tensors, {HEADER_KEY: settings, "format": "pt"}


def _tensors(layout: str, stored: Updates, kinds: Kinds, stem: Callable[[str], str]) -> Table:
    tensors: Table = {}
    for name, update in stored.items():
        kind = kinds[name]
        for own, tensor in update.tensors().items():
            column = layout != "peft" and own in kind.columns
            ending = kind.written[layout][own]
            tensors[f"{stem(name)}.{ending}"] = tensor.unsqueeze(1) if column else tensor
    return tensors


def _kind(name: str, update: Update) -> StoredKind:
    kind = STORED_KINDS.get(update.kind)
    if kind is None or not kind.written:
        raise TypeError(f"{name}: {type(update).__name__} has no file layout")
    return kind


def _unchanged(update: Update) -> Update:
    return update


def _folded(update: Update) -> Update:
    return update.folded()


_Prepare = Callable[[Update], Update]
_Write = Callable[[Updates, Kinds], tuple[Table, dict[str, str]]]
_WRITERS: dict[str, tuple[_Prepare, _Write]] = {
    "comfy": (_folded, _write_comfy),
    "kohya": (_unchanged, _write_kohya),
    "peft": (_unchanged, _write_peft),
}
LAYOUTS = tuple(_WRITERS)


def _rounded(name: str, update: Update, dtype: torch.dtype) -> Update:
    rounded = {
        role: tensor.detach().to("cpu", _dtype_of(update, role, tensor, dtype))
        for role, tensor in update.tensors().items()
    }
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in rounded.values()):
        raise ModelFileError(
            f"the {STORED_KINDS[update.kind].title} of {name} has values that {dtype} cannot hold, "
            "or NaN",
            hint="write bf16 or fp32; if that fails too, the training had diverged",
        )
    return update.with_tensors(rounded)


def _dtype_of(update: Update, role: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if update.keeps_dtype:
        return tensor.dtype
    return torch.float32 if role in update.precise else dtype


def _facts(stored: Updates) -> dict[str, str]:
    # One figure where all modules agree; kohya-style tools write "Dynamic" where they do not.
    scaled = [u for u in stored.values() if u.kind != WeightDifference.kind]
    ranks = {u.rank for u in scaled}
    alphas = {u.alpha for u in scaled}
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def model_hash(tensors: Table) -> str:
    """Return the hash that kohya-style tools and web sites know a LoRA by: all but the header."""
    content = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _check_equal(stored: Updates, read: Updates) -> None:
    if set(stored) != set(read):
        raise RuntimeError("the LoRA file that was written does not hold the same modules")
    for name, update in stored.items():
        back = read[name]
        own, other = update.tensors(), back.tensors()
        same = (
            update.kind == back.kind
            and own.keys() == other.keys()
            and all(same_bytes(own[role], other[role]) for role in own)
        )
        if not same or abs(update.scale - back.scale) > 1e-6 * abs(update.scale):
            raise RuntimeError(f"{name} differs in the LoRA file that was written")
