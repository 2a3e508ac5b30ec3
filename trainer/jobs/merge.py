"""Bake LoRAs into a base model's file, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adapters import load_adapter
from trainer.adapters.apply import fitting_modules
from trainer.adapters.base import AdapterFile, Update
from trainer.contract.diffusers_names import MARKER
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.jobs import LoRAUse
from trainer.contract.layer_names import canonical_name
from trainer.contract.loraid_metadata import slot_keys
from trainer.io.formats.stored_tensors import FP8_DTYPES, StoredTensor, read_tensor
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.io.stream_save import TensorSlot, stream_safetensors
from trainer.models.wan.detect import CONFIG_KEY, official_tensors, recognise, transformer_metadata

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did."""

    output: Path
    num_tensors: int
    num_changed: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Share:
    """One LoRA's part in one weight."""

    update: Update
    strength: float


def merge_loras(
    base: Path,
    loras: Sequence[LoRAUse],
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    on_tensor: Callable[[str], None] | None = None,
) -> MergeReport:
    """Write `base` with the LoRAs added to its weights: W + Σ strength · alpha / rank · up @ down.

    Names, prefix, metadata and (unless `dtype` is given) dtypes of the base are kept, with two
    exceptions: a folder of shards becomes one file, and diffusers' names become original ones.
    Sums are formed in float32 and rounded once.

    Args:
        base: transformer weights in any known layout.
        loras: what to add.
        output: a .safetensors file.
        dtype: of the written weights; None keeps each tensor's own. Must be given for a base in
            fp8, whose rounding would swallow the LoRA.
        force: replace `output` if it is there.
        on_tensor: called with the name of each tensor that was written.

    Raises:
        ConfigError: `output` is there already, or is one of the inputs.
        ModelFileError: a LoRA is for another model, or the base is fp8 and `dtype` is None.
        DiskError: the disk is full, read-only or faulty; `output` is as it was.
    """
    check_output(output, [base, *(lora.path for lora in loras)], force=force)
    files = open_weights(base)
    tensors = official_tensors(files)
    adapters = [load_adapter(lora.path, expert=lora.expert) for lora in loras]
    shares = _shares(files, tensors, loras, adapters)
    plan = _plan(files, tensors, dtype)

    def read(name: str) -> Tensor:
        official, slot = plan[name]
        stored = tensors[official]
        tensor = _merged(files, stored, shares.get(official, []), slot.dtype)
        changed = official in shares or slot.dtype != files[stored.name].dtype
        if changed and not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(
                f"{name} has values that {slot.dtype} cannot hold",
                hint="write bf16, or lower the strengths",
            )
        return tensor

    stream_safetensors(
        {name: slot for name, (_, slot) in plan.items()},
        read,
        output,
        _metadata(files, loras, adapters, keep_quantisation=dtype is None),
        on_tensor=on_tensor,
    )
    return MergeReport(
        output=output,
        num_tensors=len(plan),
        num_changed=len(shares),
        num_bytes=output.stat().st_size,
    )


def check_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse an output that would replace something the user did not say to replace.

    Raises:
        ConfigError: the file is there and `force` is not set, it is one of the inputs (also with
            `force`), or it is not named .safetensors.
    """
    if output.suffix != _SUFFIX:
        raise ConfigError(f"{output} must end in .safetensors")
    if any(path.exists() and output.exists() and path.samefile(output) for path in inputs):
        raise ConfigError(f"{output} is an input, too", hint="write to another file")
    if output.exists() and not force:
        raise ConfigError(f"{output} is there already", hint="give another name, or --force")


def _shares(
    files: WeightFiles,
    tensors: Mapping[str, StoredTensor],
    loras: Sequence[LoRAUse],
    adapters: Sequence[AdapterFile],
) -> dict[str, list[_Share]]:
    """Official name of each weight that changes -> what is added to it."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, stored in tensors.items():
        module, shape = name.removesuffix(".weight"), files[stored.name].shape
        if module != name and len(shape) == 2 and canonical_name(module) == module:
            shapes[module] = (shape[0], shape[1])
    shares: dict[str, list[_Share]] = {}
    for lora, adapter in zip(loras, adapters, strict=True):
        _check_expert(lora, adapter, files.metadata)
        for module, update in fitting_modules(shapes, adapter).items():
            shares.setdefault(f"{module}.weight", []).append(_Share(update, lora.strength))
    return shares


def _plan(
    files: WeightFiles, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None
) -> dict[str, tuple[str, TensorSlot]]:
    """Name in the output -> official name and what is written there."""
    coarse = [s for s in tensors.values() if s.scale or files[s.name].dtype in FP8_DTYPES]
    if coarse and dtype is None:
        raise ModelFileError(
            f"{files.path} is fp8 ({coarse[0].name}): its rounding would swallow the LoRA",
            hint="give the precision to write, such as bf16, or use the bf16 file of the model",
        )
    renamed = any(name.endswith(MARKER) for name in files)
    plan: dict[str, tuple[str, TensorSlot]] = {}
    for official, stored in tensors.items():
        info = files[stored.name]
        slot = TensorSlot(info.shape, info.dtype if dtype is None else dtype)
        plan[official if renamed else stored.name] = (official, slot)
    return plan


def _check_expert(lora: LoRAUse, adapter: AdapterFile, base: Mapping[str, str]) -> None:
    wanted, trained = base.get("menma.expert"), adapter.metadata.get("menma.expert")
    if wanted and trained and wanted != trained:
        raise ModelFileError(
            f"{lora.path} was trained for the {trained} expert, the base is the {wanted} one",
            hint="merge it into the file of its own expert",
        )


def _merged(
    files: WeightFiles, stored: StoredTensor, shares: Sequence[_Share], dtype: torch.dtype
) -> Tensor:
    if not shares:
        return read_tensor(files, stored, dtype, "cpu")
    summed = read_tensor(files, stored, torch.float32, "cpu")
    for share in shares:
        summed = share.update.added_to(summed, share.strength)
    return summed.to(dtype)


def _metadata(
    files: WeightFiles,
    loras: Sequence[LoRAUse],
    adapters: Sequence[AdapterFile],
    *,
    keep_quantisation: bool,
) -> dict[str, str]:
    own = dict(files.metadata)
    if not keep_quantisation:
        own.pop("_quantization_metadata", None)
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
        "menma.merged": json.dumps(_merged_before(own) + parts),
    }


def _merged_before(metadata: Mapping[str, str]) -> list[Any]:
    try:
        before = json.loads(metadata.get("menma.merged", "[]"))
    except ValueError:
        return []
    return before if isinstance(before, list) else []
