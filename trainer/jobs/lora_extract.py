"""The job `lora_extract`: a LoRA of what two checkpoints of one model differ in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters.apply import describe
from trainer.adapters.base import Update
from trainer.adapters.low_rank import Cut, factorise
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.jobs import LoRAExtractRequest
from trainer.contract.layer_names import canonical_name
from trainer.io.formats.stored_tensors import FP8_DTYPES, StoredTensor, read_tensor
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.jobs.base import Emit
from trainer.jobs.lora_merge import counting, target_of
from trainer.jobs.lora_metadata import HISTORY_KEY
from trainer.jobs.lora_output import Target, Written, check_output, write_lora
from trainer.jobs.lora_sum import Energies, cut_of, rank_counts
from trainer.models.wan.detect import official_tensors

_KEPT = ("ss_", "modelspec.")
_KEPT_KEYS = ("menma.variant", "menma.expert", "menma.version", "menma.run_config")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened base model: its tensors by official name."""

    files: WeightFiles
    tensors: Mapping[str, StoredTensor]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.files[self.tensors[name].name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a tensor is stored in."""
        return self.files[self.tensors[name].name].dtype

    def read(self, name: str) -> Tensor:
        """Return a tensor in float32.

        Raises:
            ModelFileError: NaN or inf; names file and key.
        """
        tensor = read_tensor(self.files, self.tensors[name], torch.float32, "cpu")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(
                f"{self.files.path}: {self.tensors[name].name} contains NaN or inf",
                hint="the training that made it had failed, or the file is damaged",
            )
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """A LoRA that was extracted.

    Attributes:
        unchanged: linear layers without a difference beyond rounding.
        leftover: tensors that differ and that a LoRA cannot hold -> relative difference.
    """

    written: Written
    ranks: dict[str, int]
    energies: Energies
    unchanged: int
    leftover: dict[str, float]


def run(request: LoRAExtractRequest, emit: Emit) -> None:
    """Job `lora_extract`; its `output` event has ranks, energy and what was left behind."""
    emit("phase", name="extract", detail=f"{request.tuned.name} minus {request.base.name}")
    found = extract_lora(
        request.base,
        request.tuned,
        target_of(request),
        cut_of(request),
        allow_partial=request.allow_partial,
        device=_device(request.device),
        on_module=counting(emit, "extract"),
    )
    if found.leftover:
        emit("warning", message=f"not in the LoRA: {_listed(found.leftover)}")
    for note in found.written.notes:
        emit("log", message=note)
    emit(
        "output",
        **found.written.fields(),
        ranks=found.ranks,
        unchanged=found.unchanged,
        leftover=dict(list(found.leftover.items())[:100]),
        **found.energies.fields(),
    )


def extract_lora(
    base: Path,
    tuned: Path,
    target: Target,
    cut: Cut,
    *,
    allow_partial: bool = False,
    device: torch.device | None = None,
    on_module: Callable[[int, int, str], None] | None = None,
) -> Extracted:
    """Write the closest LoRA to tuned − base that the cut allows, one layer in memory at a time.

    A difference that rounding to the coarser of two precisions explains counts as none.

    Raises:
        ConfigError: nothing limits the rank, the output is there already or is an input.
        ModelFileError: the two are different models, do not differ, hold NaN, or differ in norms,
            biases or other tensors that a LoRA cannot hold (unless `allow_partial`).
        DiskError: the disk is full, read-only or faulty; the output is as it was.
    """
    check_output(target.path, [base, tuned], force=target.force)
    if not cut.limits:
        raise ConfigError(
            "nothing limits the rank", hint="give --rank R, --energy E, --frobenius F or --ratio Q"
        )
    old, new = _open(base), _open(tuned)
    _check_same(old, new)
    linears = [name for name in old.tensors if _module(old, name) is not None]
    others = [name for name in old.tensors if _module(old, name) is None]
    leftover = {
        n: change for n in others if (change := _relative(_difference(old, new, n), old, n))
    }
    if leftover and not allow_partial:
        raise ModelFileError(
            f"{tuned} differs from {base} in tensors that a LoRA cannot hold: {_listed(leftover)}",
            hint="--allow-partial writes the LoRA without them; it will not act like the model",
        )
    updates: dict[str, Update] = {}
    energies = Energies()
    for number, name in enumerate(linears, start=1):
        module = name.removesuffix(".weight")
        delta = _difference(old, new, name)
        if delta is not None:
            result = factorise(delta.to(device or "cpu"), cut)
            updates[module] = result.factors
            energies.add(module, result)
        if on_module is not None:
            on_module(number, len(linears), module)
    if not updates:
        raise ModelFileError(
            f"{base} and {tuned} do not differ in any linear layer", hint="there is no LoRA in them"
        )
    facts = {"rank": cut.max_rank, "energy": cut.energy, "ratio": cut.ratio}
    written = write_lora(updates, target, [], _metadata(old, new, facts))
    return Extracted(
        written=written,
        ranks=rank_counts(updates),
        energies=energies,
        unchanged=len(linears) - len(updates),
        leftover=leftover,
    )


def _open(path: Path) -> Checkpoint:
    files = open_weights(path)
    return Checkpoint(files, official_tensors(files))


def _check_same(old: Checkpoint, new: Checkpoint) -> None:
    wrong = [n for n in old.tensors if n in new.tensors and old.shape(n) != new.shape(n)]
    only = [name for name in {**old.tensors, **new.tensors} if not _in_both(name, old, new)]
    if wrong or only:
        name = (wrong or only)[0]
        what = (
            f"{name} is {old.shape(name)} in the one and {new.shape(name)} in the other"
            if wrong
            else f"{name} is in one of them only"
        )
        raise ModelFileError(
            f"{old.files.path} and {new.files.path} are different models: {what} "
            f"({_describe(old)}; {_describe(new)})",
            hint="give the model that the other one was trained from",
        )
    told = [checkpoint.files.metadata.get("menma.expert") for checkpoint in (old, new)]
    if all(told) and told[0] != told[1]:
        raise ModelFileError(
            f"{old.files.path} is the {told[0]} expert, {new.files.path} the {told[1]} one",
            hint="give two files of one expert",
        )


def _in_both(name: str, old: Checkpoint, new: Checkpoint) -> bool:
    return name in old.tensors and name in new.tensors


def _module(checkpoint: Checkpoint, name: str) -> str | None:
    module = name.removesuffix(".weight")
    is_linear = module != name and len(checkpoint.shape(name)) == 2
    return module if is_linear and canonical_name(module) == module else None


def _difference(old: Checkpoint, new: Checkpoint, name: str) -> Tensor | None:
    """Return new − old in float32, None where there is none beyond rounding."""
    before, after = old.read(name), new.read(name)
    dtypes = {old.dtype(name), new.dtype(name)}
    delta = after.sub_(before)
    # Two numbers rounded to a format's nearest differ by up to half its eps, relatively.
    rounds = len(dtypes) > 1 or not dtypes.isdisjoint(FP8_DTYPES)
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) / 2 if rounds else 0.0
    return delta if float(delta.norm()) > tolerance * float(before.norm()) else None


def _relative(delta: Tensor | None, old: Checkpoint, name: str) -> float:
    if delta is None:
        return 0.0
    return float(delta.norm()) / max(float(old.read(name).norm()), 1e-30)


def _metadata(old: Checkpoint, new: Checkpoint, facts: Mapping[str, object]) -> dict[str, str]:
    kept = {
        key: value
        for key, value in new.files.metadata.items()
        if value and (key.startswith(_KEPT) or key in _KEPT_KEYS)
    }
    for key in _KEPT_KEYS[:2]:
        if old.files.metadata.get(key):
            kept.setdefault(key, old.files.metadata[key])
    architecture = kept.get("modelspec.architecture", "wan/transformer")
    names = [old.files.path.name, new.files.path.name]
    given = {key: value for key, value in facts.items() if value is not None}
    return {
        **kept,
        "modelspec.architecture": architecture.removesuffix("/transformer") + "/lora",
        "menma.kind": "lora",
        HISTORY_KEY: json.dumps([{"tool": "extract", "files": names, **given}]),
    }


def _describe(checkpoint: Checkpoint) -> str:
    shapes = {}
    for name in checkpoint.tensors:
        module = _module(checkpoint, name)
        if module is not None:
            outputs, inputs = checkpoint.shape(name)
            shapes[module] = (outputs, inputs)
    return f"{checkpoint.files.path.name}: {describe(shapes)}"


def _listed(leftover: Mapping[str, float]) -> str:
    largest = sorted(leftover, key=lambda name: leftover[name], reverse=True)
    named = ", ".join(f"{name} ({100 * leftover[name]:.2g} %)" for name in largest[:5])
    return named + (f" and {len(largest) - 5} more" if len(largest) > 5 else "")


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(
            "the device is cuda, but torch sees no CUDA device",
            hint="`menma doctor` says why; --device cpu works everywhere",
        )
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")
