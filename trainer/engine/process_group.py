"""The processes of one run, and the few things they tell each other.

A process learns its place from the environment that `launch.py`, torchrun or srun + torchrun set
(RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR + MASTER_PORT, or MENMA_RENDEZVOUS). Without RANK it
is alone, and nothing opens a port.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.attention.sequence import SequenceGroup
from trainer.contract.errors import ConfigError, RunError
from trainer.engine.launch import RENDEZVOUS_VARIABLE

_TEXT_BYTES = 4096
_DRAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all of them. With one process no call communicates."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence: SequenceGroup | None = None
    """The processes that share this one's clips; None: no two do."""

    @property
    def data_size(self) -> int:
        """How many different microbatches are computed at a time."""
        return self.world_size // (self.sequence.size if self.sequence else 1)

    @property
    def data_rank(self) -> int:
        """Whose turn of those microbatches is this process's, from 0."""
        return self.rank // (self.sequence.size if self.sequence else 1)

    @property
    def counts(self) -> bool:
        """Whether this is the first of the processes that compute the same clips."""
        return self.sequence is None or self.sequence.rank == 0

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> World:
        """Return the world of a single process."""
        return cls(rank=0, world_size=1, local_rank=0, device=torch.device(device))

    def gather(self, values: Tensor) -> Tensor:
        """Return the float32 vectors of all ranks as (world_size, n). A collective call."""
        values = values.detach().to(self.device, torch.float32).reshape(1, -1)
        if self.world_size == 1:
            return values
        gathered = values.new_empty(self.world_size, values.shape[1])
        dist.all_gather(list(torch.split(gathered, 1)), values)
        return gathered

    def gather_texts(self, text: str) -> list[str]:
        """Return the texts of all ranks, each cut to 4 KiB. A collective call."""
        if self.world_size == 1:
            return [text]
        content = text.encode()[:_TEXT_BYTES]
        row = torch.zeros(1, _TEXT_BYTES, dtype=torch.uint8)
        row[0, : len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[
            : len(content)
        ]
        rows = torch.empty(self.world_size, _TEXT_BYTES, dtype=torch.uint8, device=self.device)
        dist.all_gather(list(torch.split(rows, 1)), row.to(self.device))
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.cpu().numpy()]

    def text_of_rank_0(self, text: str) -> str:
        """Return rank 0's text on every rank: a decision only one may make. A collective call."""
        return self.gather_texts(text)[0]

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on some rank. A collective call."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any_rank(False)


def in_group(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a launcher started this process as one of several."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


def join(device: str, timeout_s: float) -> World:
    """Join the process group (gloo on the CPU, NCCL on CUDA) and return this process's place.

    A single process gets a group of its own that lives in memory. Joining twice returns the same
    place. `device` is "cpu" or "cuda"; each process takes the CUDA device of its local rank.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself.
        RunError: the other processes did not appear in time.
    """
    world = _place(device, os.environ)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed wants it in any case
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if dist.is_initialized():
        return world
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if world.world_size == 1:
        dist.init_process_group(
            backend,
            store=torch._C._distributed_c10d.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )
        return world
    try:
        dist.init_process_group(
            backend,
            init_method=_rendezvous(os.environ),
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
        )
        world.barrier()  # a peer that never came is reported here, not in the first step
    except (RuntimeError, dist.DistError) as error:
        raise RunError(
            f"rank {world.rank} of {world.world_size} could not join the others: {error}",
            hint="see the log for the process that failed first; distributed.timeout_s is how "
            "long the others wait",
        ) from error
    return world


@contextmanager
def joined(device: str, timeout_s: float) -> Iterator[World]:
    """Be in the process group for the duration of a block; see `join`.

    After an error the group is given up at once, so that the peers notice instead of waiting.
    """
    world = join(device, timeout_s)
    try:
        yield world
    except BaseException:
        _give_up()
        raise
    leave()


def leave() -> None:
    """Take down the process group, if there is one, after the last collective call of all ranks."""
    if not dist.is_initialized():
        return
    _destroy()
    # References to groups may be left, so gloo's threads outlive this. One that still holds
    # the last tensor when the interpreter shuts down aborts the process (exit code 134); given
    # the interpreter lock for a moment, it lets go.
    time.sleep(_DRAIN_S)


def _give_up() -> None:
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        # Destroying waits for collectives that a dead peer will never join.
        dist.distributed_c10d._abort_process_group()
    else:
        _destroy()


def _destroy() -> None:
    dist.destroy_process_group()
    # DeepSpeed keeps groups made of this one for the life of the process; with them no engine
    # could be made in a later group.
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._release_process_group_references()


def _place(device: str, environment: Mapping[str, str]) -> World:
    if "RANK" not in environment and not in_group(environment):
        return World(0, 1, 0, torch.device("cuda:0" if device == "cuda" else device))
    values: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name, "")
        if not text.isdecimal():
            raise ConfigError(
                f"the environment variable {name} is {text!r}, not a number",
                hint="start several processes with `menma train --gpus N` or torchrun, which set "
                "RANK, WORLD_SIZE and LOCAL_RANK; for one process unset all three",
            )
        values[name] = int(text)
    rank, world_size, local_rank = values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]
    if not rank < world_size:
        raise ConfigError(f"RANK is {rank} of WORLD_SIZE {world_size}", hint="RANK counts from 0")
    if device.startswith("cuda"):
        visible = torch.cuda.device_count()
        if local_rank >= visible:
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: {visible} are visible",
                hint="start at most as many processes as there are GPUs (--gpus); with SLURM "
                "ask for --gpus-per-node, not --gpus-per-task",
            )
        return World(rank, world_size, local_rank, torch.device("cuda", local_rank))
    return World(rank, world_size, local_rank, torch.device("cpu"))


def _rendezvous(environment: Mapping[str, str]) -> str:
    own = environment.get(RENDEZVOUS_VARIABLE)
    if own:
        return own
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"the environment lacks {' and '.join(missing)}",
            hint="start several processes with `menma train --gpus N` or torchrun",
        )
    return "env://"
