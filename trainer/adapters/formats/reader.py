"""Reads an adapter file of any known layout and kind. No key is ever dropped without a word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.formats.builders import BUILDERS
from trainer.adapters.formats.peft_config import PeftConfig, find_peft_settings
from trainer.adapters.formats.vera import VeraProjections
from trainer.contract.errors import ModelFileError
from trainer.contract.lora_keys import ALPHA, SHARED, Expert, Key, parse_key, unsupported_kind
from trainer.contract.stored_kinds import STORED_KINDS, VERA_ROLES, StoredKind
from trainer.io.mapped_load import WeightFiles, open_weights

_FILES_IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PARTS: dict[Expert, frozenset[str]] = {
    "high_noise": frozenset({"", "transformer_1"}),
    "low_noise": frozenset({"transformer_2"}),
}


def load_adapter(
    path: Path | str, *, expert: Expert | None = None, differences: bool = False
) -> AdapterFile:
    """Read an adapter of any known layout into updates by canonical module name.

    Layouts: kohya and musubi (`lora_unet_…`), ComfyUI and diffusion-pipe (`diffusion_model.…`),
    PEFT and diffusers (`transformer.…`, `base_model.model.…`, scale in the header or in
    `adapter_config.json`), bare names; A/B or down/up, with or without alpha, any float dtype.
    Without alpha anywhere the scale is 1, as in ComfyUI and diffusers. Kinds: LoRA, DoRA, LoHa,
    LoKr, and VeRA, which becomes a LoRA; modules of one file may be of different kinds. Whole
    differences (`.diff`, `.diff_b`): of weights of linear layers they are updates like others, of
    all other parameters they are in `AdapterFile.differences`.

    Args:
        path: the file, or a folder that PEFT or diffusers wrote.
        expert: which LoRA to take from a file that holds one for each expert of Wan 2.2.
        differences: the caller heeds `AdapterFile.differences`; else a file with whole differences
            is refused, so that none is ever left out.

    Raises:
        ModelFileError: missing, damaged, another kind of adapter, or with keys nobody knows.
    """
    path = _file(Path(path))
    files = open_weights(path)
    keys = _parse_keys(path, list(files))
    keys = _choose_expert(path, keys, expert)
    if not differences:
        _check_no_differences(path, keys)
    found = list(keys.values())
    vectors = _vectors(path, files, keys)
    keys = {name: key for name, key in keys.items() if not key.is_vector}
    layers, shared = _group(path, keys)
    kinds = {name: _kind(path, name, layer) for name, layer in layers.items()}
    scales = _Scales(path, files.metadata, keys)
    projections = _projections(path, files, layers, shared, scales)
    modules = {
        name: BUILDERS[kinds[name].name](_Module(path, files, name, layer, scales, projections))
        for name, layer in layers.items()
    }
    scales.check_alphas()
    scales.check_magnitudes(modules)
    return AdapterFile(
        modules,
        path=path,
        layout="+".join(sorted({key.layout for key in found if key.module != SHARED})),
        metadata=files.metadata,
        differences=vectors,
        notes=(*scales.notes(), *projections.notes()),
    )


@dataclass(slots=True)
class _Layer:
    """The keys of one module."""

    spelling: str
    keys: dict[str, str] = field(default_factory=dict)


class _Scales:
    """Finds alpha: in a tensor, else in PEFT's settings, else it is the rank (scale 1)."""

    def __init__(self, path: Path, metadata: Mapping[str, str], keys: Mapping[str, Key]) -> None:
        settings = find_peft_settings(path, metadata)
        part = next((key.part for key in keys.values()), "")
        self._path = path
        self._own = "menma.kind" in metadata  # written here: the scale is folded in, not unknown
        self.peft = None if settings is None else PeftConfig(settings, path, part)
        self._told = ""  # a key with an alpha
        self._assumed: list[str] = []  # a key of each module without

    def alpha(self, files: WeightFiles, layer: _Layer, rank: int) -> float:
        key = layer.keys.get(ALPHA)
        if key is not None:
            self._told = key
            return self._read(files, key)
        alpha = self.peft.alpha(layer.spelling, rank) if self.peft is not None else None
        if alpha is None:
            self._assumed.append(next(iter(layer.keys.values())))
            return float(rank)
        return alpha

    def check_alphas(self) -> None:
        """Refuse a file of which some modules have an alpha, and the scale of others is unknown."""
        if self._told and self._assumed:
            raise ModelFileError(
                f"{self._path}: {self._assumed[0]} lacks its alpha, and other modules have theirs, "
                f"such as {self._told} ({len(self._assumed)} modules lack it)",
                hint="the file is incomplete; download or export it again",
            )

    def check_magnitudes(self, modules: Mapping[str, Update]) -> None:
        if self.peft is None or not self.peft.use_dora:
            return
        plain = [name for name, update in modules.items() if update.kind == "lora"]
        if plain:
            raise ModelFileError(
                f"{self._path}: its settings say DoRA, but {plain[0]} and {len(plain) - 1} more "
                "modules lack the magnitude",
                hint="the file is incomplete; download or export it again",
            )

    def notes(self) -> tuple[str, ...]:
        if not self._assumed or self._own:
            return ()
        return (f"{len(self._assumed)} modules have no alpha: scale 1, as other programs assume",)

    def _read(self, files: WeightFiles, key: str) -> float:
        tensor = files.read(key)
        if tensor.numel() != 1 or not bool(torch.isfinite(tensor.float()).all()):
            raise ModelFileError(
                f"{self._path}: {key} must be one finite number, it is {_describe(tensor)}",
                hint="the file is damaged; download or export it again",
            )
        return float(tensor)


class _Module:
    """`kinds.StoredModule` over the file that is read."""

    def __init__(
        self,
        path: Path,
        files: WeightFiles,
        name: str,
        layer: _Layer,
        scales: _Scales,
        projections: VeraProjections,
    ) -> None:
        self.name = name
        self.projections = projections
        self._path, self._files, self._layer, self._scales = path, files, layer, scales
        self.tensors: Mapping[str, Tensor] = {
            role: _tensor(path, files, key) for role, key in layer.keys.items() if role != ALPHA
        }

    def alpha(self, rank: int) -> float:
        return self._scales.alpha(self._files, self._layer, rank)

    def outer_scale(self) -> float:
        peft = self._scales.peft
        return (
            1.0 if peft is None or ALPHA in self._layer.keys else peft.scale(self._layer.spelling)
        )

    def wrong(self, reason: str) -> ModelFileError:
        key = next(iter(self._layer.keys.values()))
        return ModelFileError(
            f"{self._path}: {self.name} ({key}): {reason}",
            hint="nothing of the file was used; if it is damaged, download or export it again",
        )


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
            f"{path} holds {found}, which is not supported",
            hint=f"nothing of the file was used; {_READABLE} of linear layers can be read",
        )
    keys = {name: parse_key(name) for name in names}
    unknown = [name for name, key in keys.items() if key is None]
    if unknown or not keys:
        raise ModelFileError(_unknown_message(path, unknown, len(keys)), hint=_UNKNOWN_HINT)
    return {name: key for name, key in keys.items() if key is not None}


_READABLE = ", ".join(kind.title for kind in STORED_KINDS.values())
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


def _check_no_differences(path: Path, keys: Mapping[str, Key]) -> None:
    whole = [name for name, key in keys.items() if key.parameter]
    if whole:
        raise ModelFileError(
            f"{path} holds whole differences of {len(whole)} weights, such as {whole[0]}, which "
            "cannot be used here",
            hint="`menma sample`, adapter.frozen, `menma merge` and `menma lora inspect`, convert, "
            "merge, subtract, resize and ema take such a file",
        )


def _vectors(path: Path, files: WeightFiles, keys: Mapping[str, Key]) -> dict[str, Tensor]:
    """Return the differences of all parameters but the weights of linear layers."""
    found: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, key in keys.items():
        if not key.is_vector:
            continue
        if key.parameter in found:
            raise ModelFileError(
                f"{path}: {first[key.parameter]} and {name} are the same difference twice",
                hint="the file holds several adapters; export one of them",
            )
        first[key.parameter] = name
        if not files[name].dtype.is_floating_point:
            raise ModelFileError(
                f"{path}: {name} is no difference of a parameter ({files[name].dtype})",
                hint="nothing of the file was used",
            )
        found[key.parameter] = _finite(path, files, name)
    return found


def _group(path: Path, keys: Mapping[str, Key]) -> tuple[dict[str, _Layer], _Layer]:
    layers: dict[str, _Layer] = {}
    for name, key in keys.items():
        layer = layers.setdefault(key.module, _Layer(key.spelling))
        if key.role in layer.keys:
            raise ModelFileError(
                f"{path}: {layer.keys[key.role]} and {name} are the same weight twice",
                hint="the file holds several adapters; export one of them",
            )
        layer.keys[key.role] = name
    return layers, layers.pop(SHARED, _Layer(""))


def _kind(path: Path, module: str, layer: _Layer) -> StoredKind:
    """Return the kind of a module by the roles of its tensors."""
    roles = layer.keys.keys() - {ALPHA}
    kinds = [kind for kind in STORED_KINDS.values() if roles <= kind.endings.keys()]
    first = next(iter(layer.keys.values()))
    if not kinds:
        parts = [
            f"{kind.title} ({layer.keys[min(own)]})"
            for kind in STORED_KINDS.values()
            if (own := roles & kind.endings.keys())
        ]
        raise ModelFileError(
            f"{path}: {module} mixes the tensors of {' and '.join(parts)} in one module, which is "
            "not supported",
            hint="nothing of the file was used",
        )
    kind = kinds[0]
    if roles in kind.forms:
        return kind
    nearest = min(kind.forms, key=lambda form: (len(form ^ roles), sorted(form)))
    lost, extra = " and ".join(sorted(nearest - roles)), sorted(roles - nearest)
    problem = (
        f"{first} lacks its {lost} factor" if lost else f"{layer.keys[extra[0]]} is one too many"
    )
    raise ModelFileError(
        f"{path}: {problem} ({kind.title} of {module})",
        hint="the file is incomplete; download or export it again",
    )


def _projections(
    path: Path,
    files: WeightFiles,
    layers: Mapping[str, _Layer],
    shared: _Layer,
    scales: _Scales,
) -> VeraProjections:
    if len(shared.keys) == 1:
        raise ModelFileError(
            f"{path}: {next(iter(shared.keys.values()))} lacks its partner",
            hint="VeRA needs both vera_A and vera_B, or neither",
        )
    outputs = {
        name: math.prod(files[layer.keys[VERA_ROLES[0]]].shape)
        for name, layer in layers.items()
        if VERA_ROLES[0] in layer.keys
    }
    if shared.keys and not outputs:
        raise ModelFileError(
            f"{path}: {next(iter(shared.keys.values()))} belongs to no module of the file",
            hint="the file is incomplete; download or export it again",
        )
    return VeraProjections(
        stored={role: _tensor(path, files, key) for role, key in shared.keys.items()},
        settings={} if scales.peft is None else scales.peft.settings,
        outputs=outputs,
    )


_VECTORS = frozenset[str]().union(*(kind.vectors for kind in STORED_KINDS.values()))


def _tensor(path: Path, files: WeightFiles, key: str) -> Tensor:
    info, parsed = files[key], parse_key(key)
    sizes = {1, 2} if parsed is not None and parsed.role in _VECTORS else {2}
    if len(info.shape) not in sizes or not info.dtype.is_floating_point:
        what = "a convolution's" if len(info.shape) > 2 else "not a"
        raise ModelFileError(
            f"{path}: {key} is {what} factor ({info.dtype}, {info.shape}); only linear layers are "
            "supported",
            hint="nothing of the file was used",
        )
    return _finite(path, files, key)


def _finite(path: Path, files: WeightFiles, key: str) -> Tensor:
    tensor = files.read(key).clone()
    if not bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all()):
        raise ModelFileError(
            f"{path}: {key} contains NaN or inf", hint="the training that made it had failed"
        )
    return tensor


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if tensor.numel() != 1 else str(tensor.item())
