"""A base model with LoRAs added to its weights, one tensor at a time, in the base's own format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adapters import load_adapter
from trainer.adapters.apply import fitting_modules
from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.difference import ParameterDifference, fitting_differences
from trainer.contract.diffusers_names import MARKER
from trainer.contract.errors import ModelFileError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.layer_names import canonical_name
from trainer.contract.lora_use import LoRAUse
from trainer.contract.loraid_metadata import slot_keys
from trainer.io.formats.stored_tensors import FP8_DTYPES, StoredTensor, read_tensor
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.io.stream_save import TensorSlot, stream_safetensors
from trainer.jobs.lora_files import check_same_expert, expert_of
from trainer.jobs.lora_metadata import lost_notes
from trainer.models.wan.detect import CONFIG_KEY, official_tensors, recognise, transformer_metadata

_QUANTISATION_KEY = "_quantization_metadata"
_SWALLOWED = 0.5
"""Rounding of more than this share of the LoRA's own size is worth a warning."""


@dataclass(slots=True)
class Rounding:
    """What writing the sums in the format of the file has cost.

    Attributes:
        error: Σ ‖written − exact‖² over the changed weights.
        update: Σ ‖exact − base‖²: the size of what was added.
        weights: Σ ‖exact‖².
        worst: the weight with the largest error relative to what was added to it.
        worst_ratio: that error.
    """

    error: float = 0.0
    update: float = 0.0
    weights: float = 0.0
    worst: str = ""
    worst_ratio: float = 0.0

    def add(self, name: str, written: Tensor, exact: Tensor, base: Tensor) -> None:
        """Count one weight, given in float32."""
        error, update = _squared(written - exact), _squared(exact - base)
        self.error += error
        self.update += update
        self.weights += _squared(exact)
        ratio = (error / update) ** 0.5 if update else 0.0
        if not self.worst or ratio > self.worst_ratio:
            self.worst, self.worst_ratio = name, ratio

    @property
    def of_update(self) -> float:
        """Error relative to the LoRAs: 1 means that rounding is as large as what was added."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0

    @property
    def of_weights(self) -> float:
        """Error relative to the weights."""
        return (self.error / self.weights) ** 0.5 if self.weights else 0.0

    def fields(self) -> dict[str, Any]:
        """Return what an event says of it."""
        return {
            "update_error": self.of_update,
            "weight_error": self.of_weights,
            "worst": {"weight": self.worst, "update_error": self.worst_ratio},
        }

    def warning(self) -> str:
        """Return what people should know, empty where the rounding is harmless."""
        if self.of_update <= _SWALLOWED:
            return ""
        return (
            f"rounding to the base's precision moves the weights by {100 * self.of_update:.0f} % "
            f"of what was added ({100 * self.of_weights:.2g} % of the weights)"
        )


@dataclass(frozen=True, slots=True)
class _Share:
    """One LoRA's part in one weight."""

    update: Update | ParameterDifference
    strength: float


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the output: its slot, and the official name of the weight it belongs to.

    `role` is `weight`, `scale` (of a changed weight in fp8) or `kept` (copied as it is).
    """

    role: str
    source: str
    slot: TensorSlot


@dataclass(slots=True)
class Merge:
    """A merge of which everything is known to fit; `write` does it.

    Attributes:
        notes: what had to be assumed of the LoRAs, and what a merge cannot keep, for people.
        rounding: filled while writing.
    """

    files: WeightFiles
    tensors: Mapping[str, StoredTensor]
    shares: Mapping[str, Sequence[_Share]]
    plan: Mapping[str, _Planned]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    rounding: Rounding = field(default_factory=Rounding)
    _scales: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_changed(self) -> int:
        """Weights that the LoRAs change."""
        return len(self.shares)

    def write(self, output: Path, on_tensor: Callable[[str], None] | None = None) -> None:
        """Write the result; `on_tensor` is called with each name.

        Raises:
            ModelFileError: a value does not fit the written dtype.
            DiskError: the disk is full, read-only or faulty; `output` is as it was.
        """
        slots = {name: planned.slot for name, planned in self.plan.items()}
        stream_safetensors(slots, self._read, output, self.metadata, on_tensor=on_tensor)

    def _read(self, name: str) -> Tensor:
        planned = self.plan[name]
        if planned.role == "kept":
            return self.files.read(planned.source)
        if planned.role == "scale":
            return self._scale(planned.source).reshape(planned.slot.shape)
        official, dtype = planned.source, planned.slot.dtype
        stored = self.tensors[official]
        if official not in self.shares:
            if dtype in FP8_DTYPES:
                return self.files.read(stored.name)
            tensor = read_tensor(self.files, stored, dtype, "cpu")
            if dtype != self.files[stored.name].dtype:
                _check_finite(name, tensor, dtype)
            return tensor
        return self._changed(name, official, dtype)

    def _changed(self, name: str, official: str, dtype: torch.dtype) -> Tensor:
        base, exact = self._sum(official)
        if dtype not in FP8_DTYPES:
            tensor = exact.to(dtype)
            _check_finite(name, tensor, dtype)
            self.rounding.add(official, tensor.float(), exact, base)
            return tensor
        _check_finite(name, exact, dtype)
        scale = self._scale(official, exact) if self.tensors[official].scale else torch.ones(1)
        rows = scale.float().reshape(-1, *(1,) * (exact.dim() - 1))
        bound = torch.finfo(dtype).max
        tensor = (exact / rows).clamp_(-bound, bound).to(dtype)
        self.rounding.add(official, tensor.float().mul_(rows), exact, base)
        return tensor

    def _sum(self, official: str) -> tuple[Tensor, Tensor]:
        base = read_tensor(self.files, self.tensors[official], torch.float32, "cpu")
        exact = base
        for share in self.shares[official]:
            exact = share.update.added_to(exact, share.strength)
        return base, exact

    def _scale(self, official: str, exact: Tensor | None = None) -> Tensor:
        """Return a fresh scale like the file's own: largest value / largest of the format."""
        if official not in self._scales:
            stored = self.tensors[official]
            if exact is None:
                _, exact = self._sum(official)
            info = self.files[stored.scale or ""]
            per_row = torch.Size(info.shape).numel() > 1
            largest = exact.abs().amax(1) if per_row else exact.abs().amax().reshape(1)
            scale = largest / torch.finfo(self.files[stored.name].dtype).max
            self._scales[official] = torch.where(scale > 0, scale, 1.0).to(info.dtype)
        return self._scales[official]


def plan_merge(base: Path, loras: Sequence[LoRAUse], dtype: torch.dtype | None = None) -> Merge:
    """Open everything and see that it fits.

    Args:
        base: transformer weights in any known layout.
        loras: what to add, strengths included.
        dtype: of the written weights; None keeps each tensor's own, fp8 and its scales included.

    Raises:
        ModelFileError: a file cannot be read, or a LoRA is for another model or expert.
    """
    files = open_weights(base)
    tensors = official_tensors(files)
    adapters = [load_adapter(lora.path, expert=lora.expert, differences=True) for lora in loras]
    check_same_expert(loras, adapters)
    shares = _shares(files, tensors, loras, adapters)
    plan = _plan(files, tensors, shares, dtype)
    metadata = _metadata(files, loras, adapters, keep_quantisation=dtype is None)
    notes = [f"{a.path.name}: {note}" for a in adapters for note in a.notes]
    notes += lost_notes(adapters)
    return Merge(files, tensors, shares, plan, metadata, tuple(notes))


def _shares(
    files: WeightFiles,
    tensors: Mapping[str, StoredTensor],
    loras: Sequence[LoRAUse],
    adapters: Sequence[AdapterFile],
) -> dict[str, list[_Share]]:
    """Official name of each weight that changes -> what is added to it."""
    shapes = linear_shapes(files, tensors)
    shares: dict[str, list[_Share]] = {}
    for lora, adapter in zip(loras, adapters, strict=True):
        _check_expert(lora, adapter, files)
        for module, update in fitting_modules(shapes, adapter).items():
            shares.setdefault(f"{module}.weight", []).append(_Share(update, lora.strength))
        own = shapes_of(files, tensors, adapter.differences)
        for name, tensor in fitting_differences(own, adapter).items():
            shares.setdefault(name, []).append(_Share(ParameterDifference(tensor), lora.strength))
    return shares


def shapes_of(
    files: WeightFiles, tensors: Mapping[str, StoredTensor], names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those of these parameters that a transformer's file has."""
    return {name: tuple(files[tensors[name].name].shape) for name in names if name in tensors}


def linear_shapes(
    files: WeightFiles, tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, int]]:
    """Return the (O, I) shapes of a transformer's linear layers by name, from its file's header."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, stored in tensors.items():
        module, shape = name.removesuffix(".weight"), files[stored.name].shape
        if module != name and len(shape) == 2 and canonical_name(module) == module:
            shapes[module] = (shape[0], shape[1])
    return shapes


def _plan(
    files: WeightFiles,
    tensors: Mapping[str, StoredTensor],
    shares: Mapping[str, Sequence[_Share]],
    dtype: torch.dtype | None,
) -> dict[str, _Planned]:
    """Name in the output -> what is written there."""
    renamed = any(name.endswith(MARKER) for name in files)
    plan: dict[str, _Planned] = {}
    for official, stored in tensors.items():
        info = files[stored.name]
        slot = TensorSlot(info.shape, info.dtype if dtype is None else dtype)
        plan[official if renamed else stored.name] = _Planned("weight", official, slot)
    if dtype is not None:
        return plan
    fresh = {stored.scale: name for name in shares if (stored := tensors[name]).scale is not None}
    read = {stored.name for stored in tensors.values()}
    for name in (name for name in files if name not in read):
        if renamed:
            if name.endswith(_STRAY):
                continue
            raise ModelFileError(
                f"{files.path} has diffusers' names and, beside its weights, {name}, which has "
                "no place in the merged file",
                hint="give the precision to write, such as --dtype bf16",
            )
        slot = TensorSlot(files[name].shape, files[name].dtype)
        own = fresh.get(name)
        plan[name] = _Planned("kept", name, slot) if own is None else _Planned("scale", own, slot)
    return plan


_STRAY = "norm_added_q.weight"
"""Diffusers files may hold this norm of a query that no model has."""


def _check_expert(lora: LoRAUse, adapter: AdapterFile, base: WeightFiles) -> None:
    wanted = base.metadata.get("menma.expert")
    trained = expert_of(lora, adapter)
    if wanted in EXPERTS and trained is not None and wanted != trained:
        raise ModelFileError(
            f"{lora.path} is for the {trained} expert, and {base.path} is the {wanted} expert",
            hint="merge it into the file of its own expert",
        )


def _metadata(
    files: WeightFiles,
    loras: Sequence[LoRAUse],
    adapters: Sequence[AdapterFile],
    *,
    keep_quantisation: bool,
) -> dict[str, str]:
    own = dict(files.metadata)
    if not keep_quantisation:
        own.pop(_QUANTISATION_KEY, None)
    if files.config and CONFIG_KEY not in own:
        # config.json stays behind; what it told of the shape must not.
        shape = recognise(files).config
        own[CONFIG_KEY] = transformer_metadata(shape, "")[CONFIG_KEY]
    names = [files.path.name, *(lora.path.name for lora in loras)]
    parts = [
        {"file": lora.path.name, "strength": lora.strength, **slot_keys(adapter.metadata)}
        for lora, adapter in zip(loras, adapters, strict=True)
    ]
    return own | {
        "modelspec.merged_from": ", ".join(names),
        "menma.merged": json.dumps(merged_before(own) + parts),
    }


def merged_before(metadata: Mapping[str, str]) -> list[Any]:
    """Return the LoRAs that a model's header says are merged into it: file and strength."""
    try:
        before = json.loads(metadata.get("menma.merged", "[]"))
    except ValueError:
        return []
    return before if isinstance(before, list) else []


def _check_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ModelFileError(
            f"{name} has values that {dtype} cannot hold",
            hint="write bf16, or lower the strengths",
        )


def _squared(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))
