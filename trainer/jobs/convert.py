"""Rewrite a LoRA in another layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.adapters import load_adapter
from trainer.adapters.base import AdapterFile
from trainer.adapters.formats.peft_config import HEADER_KEY
from trainer.adapters.formats.writer import save_adapter
from trainer.contract.lora_keys import Expert
from trainer.jobs.merge import check_output


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion did."""

    output: Path
    source_layout: str
    layout: str
    dtype: torch.dtype
    num_modules: int
    notes: tuple[str, ...]


def convert_lora(
    source: Path,
    output: Path,
    *,
    layout: str = "comfy",
    dtype: torch.dtype | None = None,
    expert: Expert | None = None,
    force: bool = False,
) -> ConvertReport:
    """Write the LoRA in `source` to `output` in another layout; the update it makes is the same.

    Args:
        source: LoRA in any known layout.
        output: a .safetensors file.
        layout: `comfy`, `kohya` or `peft`.
        dtype: of the written factors; None: the most precise one in the file. `comfy` multiplies
            the scale into one factor, which rounds it in 16 bits unless the scale is 2ⁿ.
        expert: which LoRA to take from a file that holds two.
        force: replace `output` if it is there.

    Raises:
        ConfigError: `output` is there already or is the input, or there is no such layout.
        ModelFileError: the file cannot be read, or a value does not fit `dtype`.
        DiskError: the disk is full, read-only or faulty; `output` is as it was.
    """
    check_output(output, [source], force=force)
    adapter = load_adapter(source, expert=expert)
    dtype = dtype or _most_precise(adapter)
    metadata = {key: value for key, value in adapter.metadata.items() if key != HEADER_KEY}
    metadata["menma.converted_from"] = f"{adapter.layout}, {source.name}"
    save_adapter(adapter, output, layout=layout, dtype=dtype, metadata=metadata)
    return ConvertReport(
        output=output,
        source_layout=adapter.layout,
        layout=layout,
        dtype=dtype,
        num_modules=len(adapter),
        notes=adapter.notes,
    )


def _most_precise(adapter: AdapterFile) -> torch.dtype:
    dtypes = {tensor.dtype for update in adapter.values() for tensor in update.tensors().values()}
    return _common(dtypes)


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first if first.itemsize > 1 else torch.bfloat16
