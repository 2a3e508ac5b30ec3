"""Optimizer state that ZeRO-3 keeps in files: brought into memory one subgroup after the other.

`optimizer` is DeepSpeed's stage 3 optimizer (0.19.8). A subgroup of less than 1 MiB stays in RAM.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def resident(optimizer: Any, index: int, *, changed: bool) -> Iterator[None]:
    """Have fp32 weights and moments of subgroup `index` in memory for the duration of a block.

    Args:
        optimizer: DeepSpeed's.
        index: of the subgroup.
        changed: write it back afterwards.
    """
    if not optimizer._swappable_optimizer_subgroup(index):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if changed:
            optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            optimizer._release_swap_buffers(index)


def inner_step(optimizer: Any) -> None:
    """Let the inner optimizer step over every subgroup; what is in files gets gradients of 0."""
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        with resident(optimizer, index, changed=True):
            if optimizer._swappable_optimizer_subgroup(index):
                flat.grad = torch.zeros_like(flat)
            optimizer._optimizer_step(index)


def gather_masters(
    optimizer: Any, trainable: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every trained parameter, whole, float32, on its device. A collective call.

    Each subgroup is read once, where `safe_get_full_fp32_param` reads one for every parameter.
    """
    names = {id(parameter): name for name, parameter in trainable.items()}
    for index, group in enumerate(optimizer.fp16_groups):
        with resident(optimizer, index, changed=False):
            flat = optimizer.fp32_partitioned_groups_flat[index]
            for parameter in group:
                _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                shard = flat.detach().narrow(0, offset, size)
                yield names[id(parameter)], optimizer._fp32_state_allgather(parameter, shard)


def remove_files(folder: Path, rank: int) -> None:
    """Remove what DeepSpeed left of one rank in `folder`, and folders that are empty then."""
    for mine in folder.glob(f"zero_stage_3/*/rank{rank}"):
        shutil.rmtree(mine, ignore_errors=True)
        for parent in (mine.parent, mine.parent.parent, folder):
            with suppress(OSError):
                parent.rmdir()
