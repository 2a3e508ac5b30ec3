"""Copies beside the computation: the few things that streaming needs of a device.

Work is issued on two queues. The *compute* queue runs the model; the *copy* queue runs beside it.
Neither waits for the other unless told to, so each crossing has its mark:

- a copy returns a mark, and the computation waits for it before it touches what was copied;
- the computation leaves a mark behind the last use of a buffer, and the copy queue waits for it
  before the buffer is written again.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.contract.errors import RunError

PAGE = 4096
"""Bytes. Memory is locked by whole pages, and a page cannot be locked twice."""

Mark = Any
"""A point in one of the queues; only its maker knows what it is."""


class Streams(Protocol):
    """Two queues of one device, and memory on both sides."""

    device: torch.device
    """Where what `device_bytes` returns lies."""

    def host_bytes(self, num: int) -> Tensor:
        """Return memory of the host that copies may run from and to, uint8 (num,).

        Raises:
            RunError: the host has no such memory left.
        """
        ...

    def lock(self, pages: Tensor) -> None:
        """Let copies run from memory that is there already, whole pages, uint8 (n · PAGE,).

        Raises:
            RunError: the host cannot lock that much.
        """
        ...

    def device_bytes(self, num: int) -> Tensor:
        """Return memory of the device, uint8 (num,). The compute queue may still use it."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        """Copy in the copy queue; return the mark behind the copy. Does not wait."""
        ...

    def await_copy(self, mark: Mark) -> None:
        """Let the computation go on only when the copy of `mark` is done."""
        ...

    def mark_use(self) -> Mark:
        """Return a mark behind all that the computation has been given so far."""
        ...

    def await_use(self, mark: Mark) -> None:
        """Let the next copies begin only when the computation has come to `mark`."""
        ...


class CudaStreams:
    """Streams and events of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own gap

    def host_bytes(self, num: int) -> Tensor:
        """Return page-locked memory of exactly this size.

        torch's own allocator for it rounds up to a power of two: 40 GB for the 28 of a 14B model.

        Raises:
            RunError: the driver refuses to lock that much.
        """
        num_pages = -(-num // PAGE)
        memory = torch.empty((num_pages + 1) * PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE
        pages = memory[start : start + num_pages * PAGE]
        self.lock(pages)
        return pages[:num]

    def lock(self, pages: Tensor) -> None:
        """Lock the pages for as long as their storage lives."""
        pin(pages, self.device, self._copies)

    def device_bytes(self, num: int) -> Tensor:
        """Return memory of the device, uint8 (num,)."""
        return torch.empty(num, dtype=torch.uint8, device=self.device)

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        """Copy in the stream of copies."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        # Whoever forgets a buffer while it is copied must not hand its memory to the computation.
        (target if target.is_cuda else source).record_stream(self._copies)
        return self._copies.record_event()

    def await_copy(self, mark: Mark) -> None:
        """Let the current stream wait."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def mark_use(self) -> Mark:
        """Record an event in the current stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def await_use(self, mark: Mark) -> None:
        """Let the stream of copies wait."""
        self._copies.wait_event(mark)


class HostStreams:
    """A stand-in without a device: memory of its own for "the device", every copy counted.

    Copies are done when they are issued. It is what a training on the CPU gets.

    Attributes:
        copies: copies since the start.
        held: bytes of device memory that is alive.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.copies = 0
        self.held = 0

    def host_bytes(self, num: int) -> Tensor:
        """Return ordinary memory."""
        return torch.empty(num, dtype=torch.uint8)

    def lock(self, pages: Tensor) -> None:
        """Do nothing: ordinary memory will do."""

    def device_bytes(self, num: int) -> Tensor:
        """Return ordinary memory that counts as the device's."""
        memory = torch.empty(num, dtype=torch.uint8)
        self.held += num
        weakref.finalize(memory.untyped_storage(), self._freed, num)
        return memory

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        """Copy now."""
        target.copy_(source)
        self.copies += 1
        return None

    def await_copy(self, mark: Mark) -> None:
        """Do nothing: the copy is done."""

    def mark_use(self) -> Mark:
        """Return nothing: what was computed, was computed at once."""
        return None

    def await_use(self, mark: Mark) -> None:
        """Do nothing."""

    def _freed(self, num: int) -> None:
        self.held -= num


def streams_of(device: torch.device) -> Streams:
    """Return the streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()


def pin(pages: Tensor, device: torch.device, copies: torch.cuda.Stream) -> None:
    """Lock whole pages of the host, uint8 (n · PAGE,), for as long as their storage lives.

    Args:
        pages: the memory.
        device: of the copies.
        copies: the stream they run in; it is waited for before the pages are given up.

    Raises:
        RunError: the driver refuses.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own gap
    address, num = pages.data_ptr(), pages.numel()
    with torch.cuda.device(device):
        answer = int(runtime.cudaHostRegister(address, num, 0))
    if answer:
        raise RunError(
            f"the driver cannot lock {num / 2**30:.2f} GiB of RAM for weights that wait there "
            f"(CUDA error {answer})",
            hint="use fp8 weights, a smaller memory.blocks_to_swap, or one expert of Wan 2.2 at a "
            "time (model.expert), or raise the limit of locked memory (ulimit -l; in a container: "
            "--ulimit memlock=-1)",
        )

    def unpin() -> None:
        copies.synchronize()
        runtime.cudaHostUnregister(address)

    unlock = weakref.finalize(pages.untyped_storage(), unpin)
    unlock.atexit = False  # the driver may be gone by then, and gives everything back itself
