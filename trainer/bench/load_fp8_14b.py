"""`load_fp8` with the shape of the 14B model: what the limit is really about.

Writes a file of 13.5 GiB and loads it, so disk and memory are looked at before.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import psutil
import torch

from trainer.bench import load_fp8
from trainer.bench.result import Measurement
from trainer.contract.errors import RunError
from trainer.contract.variants import get_variant
from trainer.models.wan.quantised import is_block_linear
from trainer.models.wan.transformer import WanTransformer

GIB = 2**30
VARIANT = "wan2.1-t2v-14b"
INTERPRETER_BYTES = 0.6 * GIB
"""This process and the one that loads, with torch."""
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def measure(*, variant: str = VARIANT, folder: Path | None = None) -> Measurement:
    """Return what `load_fp8.measure` returns for a fp8_scaled file of the 14B shape.

    Args:
        variant: whose shapes the file has.
        folder: where the file is made; None: a temporary folder.

    Raises:
        RunError: disk or memory are too small, or what `load_fp8.measure` raises.
    """
    place = Path(tempfile.gettempdir()) if folder is None else folder
    check_room(file_bytes(variant), place)
    return load_fp8.measure(name="load_fp8_14b", variant=variant, folder=folder)


def file_bytes(variant: str) -> int:
    """Return the size of a fp8_scaled file of the variant's shapes, its header left out."""
    with torch.device("meta"):
        state = WanTransformer(get_variant(variant).transformer, seed=None).state_dict()
    return sum(
        value.numel() + 4 * value.shape[0] if is_block_linear(name, value.shape) else value.nbytes
        for name, value in ((name, value.to(torch.bfloat16)) for name, value in state.items())
    )


def check_room(size: int, folder: Path) -> None:
    """See that a file of `size` bytes can be written in `folder` and loaded.

    Raises:
        RunError: it cannot, with what is needed and what there is.
    """
    free = shutil.disk_usage(folder).free
    if free < 1.02 * size:
        raise RunError(
            f"the file takes {size / GIB:.1f} GiB, and {folder} has {free / GIB:.1f} GiB free",
            hint="set TMPDIR to a folder on a larger disk",
        )
    # A folder in memory holds the file a second time.
    copies = 2.1 if _file_system(folder) in _IN_MEMORY else 1.1
    needed = copies * size + INTERPRETER_BYTES
    there = psutil.virtual_memory().available
    if there < needed:
        raise RunError(
            f"loading takes up to {needed / GIB:.1f} GiB of RAM, and {there / GIB:.1f} GiB are "
            "available",
            hint="end other programs, or measure the smaller shape: menma bench load_fp8",
        )


def _file_system(folder: Path) -> str:
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    return next((mounts[path] for path in (place, *place.parents) if path in mounts), "")
