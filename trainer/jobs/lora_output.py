"""How every tool writes the LoRA that it made: layout, precision, header, all or nothing."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.formats.writer import LAYOUTS, save_adapter
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.files import disk_errors, fsync
from trainer.contract.parameter_names import stored_name
from trainer.jobs.lora_files import is_plain

FOLDED_KEY = "menma.folded_alpha"
"""Header: the alphas that were multiplied into the factors, and the precision they had before."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the user asked of a file.

    Attributes:
        path: a .safetensors file.
        layout: of the keys; None: that of the first input, `comfy` where it cannot be written.
        dtype: of the factors; None: see `write_lora`.
        force: replace the file if it is there.
    """

    path: Path
    layout: str | None = None
    dtype: torch.dtype | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A LoRA that was written."""

    path: Path
    layout: str
    dtype: torch.dtype
    num_modules: int
    notes: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Return what an `output` event says of it."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "dtype": dtype_name(self.dtype),
            "num_modules": self.num_modules,
            "num_bytes": self.path.stat().st_size,
        }


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


def write_lora(
    updates: Mapping[str, Update],
    target: Target,
    inputs: Sequence[AdapterFile],
    metadata: Mapping[str, str],
    *,
    exact: bool = False,
    differences: Mapping[str, Tensor] | None = None,
) -> Written:
    """Write the LoRA that a tool made; see `save_adapter` for what is verified.

    Args:
        updates: by canonical module name.
        target: where and how.
        inputs: what it was made of; layout and precision follow them.
        metadata: of the header.
        exact: the updates are no approximation, so without a `dtype` they are written in fp32
            where the inputs' precision would round them.
        differences: of parameters that are no weights of linear layers, as they are written.

    Raises:
        ConfigError, ModelFileError, DiskError: as `save_adapter`.
    """
    layout = target.layout or layout_of(inputs)
    dtype = target.dtype
    notes: tuple[str, ...] = ()
    if dtype is None:
        dtype = common_dtype(inputs)
        if exact and not _is_lossless(updates, layout, dtype):
            notes = (f"written in fp32, because {dtype_name(dtype)} would round the factors",)
            dtype = torch.float32
    # Written here: a missing alpha is folded in, not unknown.
    table = {"menma.kind": "lora", **metadata}
    if layout == "comfy":
        table |= folded_alphas(updates, common_dtype(inputs))
    save_adapter(
        updates,
        target.path,
        layout=layout,
        dtype=dtype,
        metadata=table,
        differences=differences,
    )
    return Written(
        path=target.path, layout=layout, dtype=dtype, num_modules=len(updates), notes=notes
    )


def write_together(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write several files so that either all of them appear or none.

    Each writer gets a path in a folder beside its file; when all are done they are renamed.

    Raises:
        DiskError: the disk is full, read-only or gone; what stood there before is as it was,
            unless the disk fails between two renames.
    """
    folders: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.parent not in folders:
                    folders[path.parent] = Path(tempfile.mkdtemp(prefix=".lora-", dir=path.parent))
            write(folders[path.parent] / path.name)
        for path in files:
            with disk_errors(path):
                (folders[path.parent] / path.name).replace(path)
                fsync(path.parent)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def layout_of(inputs: Sequence[AdapterFile]) -> str:
    """Return the first input's layout where it can be written, else `comfy`."""
    own = inputs[0].layout if inputs else ""
    return own if own in LAYOUTS else "comfy"


def common_dtype(inputs: Sequence[Mapping[str, Update]]) -> torch.dtype:
    """Return the most precise dtype of any factor; bfloat16 for those in 8 bits or of none."""
    found: torch.dtype | None = None
    for adapter in inputs:
        for update in adapter.values():
            for role, tensor in update.tensors().items():
                if role in update.precise or update.keeps_dtype:
                    continue
                wide = tensor.dtype if tensor.dtype.itemsize > 1 else torch.bfloat16
                found = wide if found is None else torch.promote_types(found, wide)
    return found or torch.bfloat16


def folded_alphas(updates: Mapping[str, Update], dtype: torch.dtype) -> dict[str, str]:
    """Return the header entry that keeps the alphas which a file without alpha loses."""
    scaled = {name: update for name, update in updates.items() if is_plain(update)}
    if all(update.scale == 1.0 for update in scaled.values()):
        return {}
    alphas = {name: update.alpha for name, update in scaled.items()}
    one = len(set(alphas.values())) == 1 and len(alphas) == len(updates)
    table = {"alpha": next(iter(alphas.values())) if one else alphas, "dtype": dtype_name(dtype)}
    return {FOLDED_KEY: json.dumps(table)}


def in_dtype(
    path: Path, differences: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the differences of parameters in a precision; None: each in its own.

    Args:
        path: the file that they are of.
        differences: by canonical name.
        dtype: the precision.

    Raises:
        ModelFileError: a value does not fit `dtype`; names file and parameter.
    """
    if dtype is None:
        return dict(differences)
    found = {name: tensor.to(dtype) for name, tensor in differences.items()}
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(
                f"{path}: {stored_name(name)} has values that {dtype} cannot hold",
                hint="write bf16 or fp32",
            )
    return found


def matrices_in_dtype(
    updates: Mapping[str, Update], dtype: torch.dtype | None
) -> dict[str, Update]:
    """Return updates with the whole differences among them in a precision; None: as they are."""
    if dtype is None:
        return dict(updates)
    return {
        name: update.with_tensors({role: part.to(dtype) for role, part in update.tensors().items()})
        if update.keeps_dtype
        else update
        for name, update in updates.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` and its like."""
    return str(dtype).removeprefix("torch.")


def is_power_of_two(value: float) -> bool:
    """Tell whether multiplying by `value` only moves the exponent."""
    return value > 0 and math.frexp(value)[0] == 0.5


def _is_lossless(updates: Mapping[str, Update], layout: str, dtype: torch.dtype) -> bool:
    return all(
        bool((tensor.to(dtype).double() == tensor.double()).all())
        for update in updates.values()
        for role, tensor in (update.folded() if layout == "comfy" else update).tensors().items()
        if role not in update.precise and not update.keeps_dtype
    )
