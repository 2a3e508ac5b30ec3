"""Memory that the processes of one machine have in common: written by one, mapped by all.

The memory is a file without a name (memfd_create, Linux): it is no part of /dev/shm, whose size
containers limit, and the kernel frees it with the last process that maps it, however that ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.contract.errors import RunError

NAME = "menma-blocks"
"""What /proc/PID/maps calls such memory, behind "memfd:"."""

_SEAL_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE of linux/fcntl.h (Linux 5.1): mappings made so far stay as they are."""


@dataclass(frozen=True, slots=True)
class HostShare:
    """The processes of one machine that need the same bytes, as one of them sees them."""

    leads: bool
    """This process writes; the others map what it wrote."""
    tell: Callable[[str], str]
    """Returns the leader's text on every process, whose own are ignored. A collective call."""

    def memory(self, num: int, contents: str, fill: Callable[[Tensor], None]) -> Tensor:
        """Return shared memory, uint8 (num,), that is filled. A collective call.

        Args:
            num: bytes, above 0.
            contents: says what is in it; must be the same in every process.
            fill: writes it; called in the leader only.

        Raises:
            RunError: the leader has something else, or its memory cannot be reached.
        """
        if self.leads:
            return self._lead(num, contents, fill)
        theirs, file = self.tell("").split(" ", 1)
        if theirs != contents:
            raise RunError(
                "the processes of this machine read different weights",
                hint="let every process find the same file under the path in [model], and start "
                "anew when it no longer changes",
            )
        memory = _map_of(file, num)
        self.tell("")
        return memory

    def _lead(self, num: int, contents: str, fill: Callable[[Tensor], None]) -> Tensor:
        file, memory = _make(num)
        try:
            fill(memory)
            self.tell(f"{contents} /proc/{os.getpid()}/fd/{file}")
            self.tell("")  # all have mapped it
            _seal(file)
        finally:
            os.close(file)
        return memory


def _make(num: int) -> tuple[int, Tensor]:
    """Return a file without a name, and its memory; the caller closes the file."""
    try:
        file = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, num)
            return file, _map(file, num)
        except BaseException:
            os.close(file)
            raise
    except OSError as error:
        raise RunError(
            f"{num / 2**30:.2f} GiB of shared memory for weights that wait in RAM cannot be had: "
            f"{error}",
            hint="use fp8 weights, a smaller memory.blocks_to_swap, or one expert of Wan 2.2 at a "
            "time (model.expert)",
        ) from error


def _map_of(name: str, num: int) -> Tensor:
    try:
        file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            return _map(file, num)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise RunError(
            f"the swapped blocks of this machine's first process cannot be mapped: {error}",
            hint="run all processes of a machine as the same user, with /proc mounted",
        ) from error


def _map(file: int, num: int) -> Tensor:
    # Writable in every process although one writes: CUDA locks read-only mappings on some
    # devices only.
    shared = mmap.mmap(file, num, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(shared, dtype=torch.uint8)


def _seal(file: int) -> None:
    """Let nobody change the size any more, nor open or map it anew for writing."""
    import fcntl  # not there on Windows, where nothing is shared

    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:  # an older kernel: the mappings are the same, a guard less
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
