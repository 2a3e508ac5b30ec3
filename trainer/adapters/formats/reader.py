"""Reads a LoRA file of any known layout. No key is ever dropped without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.base import AdapterFile, LoRAFactors
from trainer.adapters.formats.peft_config import PeftConfig, find_peft_settings
from trainer.contract.errors import ModelFileError
from trainer.contract.lora_keys import Expert, Key, Role, parse_key, unsupported_kind
from trainer.io.mapped_load import WeightFiles, open_weights

_FILES_IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PARTS: dict[Expert, frozenset[str]] = {
    "high_noise": frozenset({"", "transformer_1"}),
    "low_noise": frozenset({"transformer_2"}),
}


def load_adapter(path: Path | str, *, expert: Expert | None = None) -> AdapterFile:
    """Read a LoRA of any known layout into factors by canonical module name.

    Layouts: kohya and musubi (`lora_unet_…`), ComfyUI and diffusion-pipe (`diffusion_model.…`),
    PEFT and diffusers (`transformer.…`, `base_model.model.…`, scale in the header or in
    `adapter_config.json`), bare names; A/B or down/up, with or without alpha, any float dtype.
    Without alpha anywhere the scale is 1, as in ComfyUI and diffusers.

    Args:
        path: the file, or a folder that PEFT or diffusers wrote.
        expert: which LoRA to take from a file that holds one for each expert of Wan 2.2.

    Raises:
        ModelFileError: missing, damaged, another kind of adapter, or with keys nobody knows.
    """
    path = _file(Path(path))
    files = open_weights(path)
    keys = _parse_keys(path, list(files))
    keys = _choose_expert(path, keys, expert)
    layers = _group(path, keys)
    scales = _Scales(path, files.metadata, keys)
    modules = {name: _factors(path, files, name, layer, scales) for name, layer in layers.items()}
    return AdapterFile(
        modules,
        path=path,
        layout="+".join(sorted({key.layout for key in keys.values()})),
        metadata=files.metadata,
        notes=scales.notes(),
    )


@dataclass(slots=True)
class _Layer:
    """The keys of one module."""

    spelling: str
    keys: dict[Role, str] = field(default_factory=dict)


class _Scales:
    """Finds alpha: in a tensor, else in PEFT's settings, else it is the rank (scale 1)."""

    def __init__(self, path: Path, metadata: Mapping[str, str], keys: Mapping[str, Key]) -> None:
        settings = find_peft_settings(path, metadata)
        part = next(iter(keys.values())).part
        self._path = path
        self._own = "menma.kind" in metadata  # written here: the scale is folded in, not unknown
        self._peft = None if settings is None else PeftConfig(settings, path, part)
        self._assumed = 0

    def alpha(self, files: WeightFiles, layer: _Layer, rank: int) -> float:
        key = layer.keys.get("alpha")
        if key is not None:
            return self._read(files, key)
        alpha = self._peft.alpha(layer.spelling, rank) if self._peft is not None else None
        if alpha is None:
            self._assumed += 1
            return float(rank)
        return alpha

    def notes(self) -> tuple[str, ...]:
        if not self._assumed or self._own:
            return ()
        return (f"{self._assumed} modules have no alpha: scale 1, as other programs assume",)

    def _read(self, files: WeightFiles, key: str) -> float:
        tensor = files.read(key)
        if tensor.numel() != 1 or not bool(torch.isfinite(tensor.float()).all()):
            raise ModelFileError(
                f"{self._path}: {key} must be one finite number, it is {_describe(tensor)}",
                hint="the file is damaged; download or export it again",
            )
        return float(tensor)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _FILES_IN_FOLDER if (path / name).is_file()]
    if not found:
        raise ModelFileError(
            f"{path} holds no LoRA ({' or '.join(_FILES_IN_FOLDER)})",
            hint="give the path of the LoRA file",
        )
    return found[0]


def _parse_keys(path: Path, names: Iterable[str]) -> dict[str, Key]:
    names = list(names)
    kinds: dict[str, str] = {}
    for name in names:
        kind = unsupported_kind(name)
        if kind is not None:
            kinds.setdefault(kind, name)
    if kinds:
        found = ", ".join(f"{kind} (such as {name})" for kind, name in kinds.items())
        raise ModelFileError(
            f"{path} holds {found}, which is not supported yet",
            hint="nothing of the file was used; only plain LoRA can be read",
        )
    keys = {name: parse_key(name) for name in names}
    unknown = [name for name, key in keys.items() if key is None]
    if unknown or not keys:
        raise ModelFileError(_unknown_message(path, unknown, len(keys)), hint=_UNKNOWN_HINT)
    return {name: key for name, key in keys.items() if key is not None}


_UNKNOWN_HINT = "a LoRA for Wan has keys such as diffusion_model.blocks.0.self_attn.q.lora_A.weight"


def _unknown_message(path: Path, unknown: list[str], total: int) -> str:
    if not total:
        return f"{path} is empty: it holds no tensors"
    listed = ", ".join(unknown[:8]) + (", …" if len(unknown) > 8 else "")
    return (
        f"{path}: {len(unknown)} of {total} keys belong to no known LoRA of a Wan model: {listed}"
    )


def _choose_expert(path: Path, keys: dict[str, Key], expert: Expert | None) -> dict[str, Key]:
    parts = {key.part for key in keys.values()}
    if len(parts) == 1:
        return keys
    if expert is None:
        raise ModelFileError(
            f"{path} holds LoRAs for both experts of Wan 2.2",
            hint="say which one is wanted: high_noise or low_noise",
        )
    return {name: key for name, key in keys.items() if key.part in _PARTS[expert]}


def _group(path: Path, keys: Mapping[str, Key]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for name, key in keys.items():
        layer = layers.setdefault(key.module, _Layer(key.spelling))
        if key.role in layer.keys:
            raise ModelFileError(
                f"{path}: {layer.keys[key.role]} and {name} are the same weight twice",
                hint="the file holds several adapters; export one of them",
            )
        layer.keys[key.role] = name
    for layer in layers.values():
        missing = {"down", "up"} - layer.keys.keys()
        if missing:
            lost = " and ".join(sorted(missing))
            raise ModelFileError(
                f"{path}: {next(iter(layer.keys.values()))} lacks its {lost} factor",
                hint="the file is incomplete; download or export it again",
            )
    return layers


def _factors(
    path: Path, files: WeightFiles, module: str, layer: _Layer, scales: _Scales
) -> LoRAFactors:
    down, up = (_matrix(path, files, layer.keys[role]) for role in ("down", "up"))
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ModelFileError(
            f"{path}: the ranks of {module} differ: down is {tuple(down.shape)}, up is "
            f"{tuple(up.shape)}",
            hint="the file is damaged; download or export it again",
        )
    return LoRAFactors(down, up, scales.alpha(files, layer, down.shape[0]))


def _matrix(path: Path, files: WeightFiles, key: str) -> Tensor:
    info = files[key]
    if len(info.shape) != 2 or not info.dtype.is_floating_point:
        what = "a convolution's" if len(info.shape) > 2 else "not a"
        raise ModelFileError(
            f"{path}: {key} is {what} factor ({info.dtype}, {info.shape}); only linear layers are "
            "supported",
            hint="nothing of the file was used",
        )
    tensor = files.read(key).clone()
    if not bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all()):
        raise ModelFileError(
            f"{path}: {key} contains NaN or inf", hint="the training that made it had failed"
        )
    return tensor


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if tensor.numel() != 1 else str(tensor.item())
