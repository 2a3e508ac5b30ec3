"""Block swap: frozen blocks stay in RAM and pass through a ring of buffers on the device.

One way only: frozen weights never change, so nothing is copied back and a block is put away by
forgetting its copy. The blocks follow one another in a known order (up in the forward, down in the
backward), so the next ones are copied while one computes, and what is on the device when forward
turns into backward is used again before it makes room. The design follows what musubi-tuner and
diffusion-pipe found about one-way streaming; code and order of events are our own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trainer.memory.flat_block import FlatBlock
from trainer.memory.host_share import HostShare
from trainer.memory.streams import PAGE, Mark, Streams

RING = 2
"""Buffers on the device: one block computes while the next one arrives."""


@dataclass(slots=True)
class _Slot:
    """A buffer of the ring."""

    flat: Tensor
    used: Mark
    """Behind the last use of what is in it."""
    block: int | None = None
    arrival: Mark = None
    awaited: bool = True
    views: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor that autograd keeps, by its place in a block instead of by its memory."""

    block: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class BlockSwap:
    """Streams the frozen tensors of some of a stack's blocks.

    Ask for a block with `need` before every use, in forward, recomputation and backward alike;
    blocks that are not streamed are asked for, too, since that says where the computation is. Only
    the block asked for last may be used.

    Attributes:
        streamed: the indices of the blocks that are streamed, ascending.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        num: int,
        streams: Streams,
        *,
        ring: int = RING,
        share: HostShare | None = None,
    ) -> None:
        """Take `num` of the blocks over; they are on the host, and what trains is added later.

        Args:
            blocks: in the order they run in.
            num: how many are streamed; they are spread evenly, so that those that stay give the
                copies time.
            streams: of the device.
            ring: buffers on the device, at least 2 unless a single block is streamed.
            share: the processes of this machine that stream the same blocks: they hold them once,
                filled by the one that leads; the others' streamed blocks may be on the meta
                device. Then a collective call. None: memory of this process's own.

        Raises:
            RunError: the host memory cannot be locked or shared.
            ValueError: not that many blocks, or too small a ring.
        """
        if not 0 < num <= len(blocks) or ring < min(2, num):
            raise ValueError(f"{num} of {len(blocks)} blocks through {ring} buffers")
        self.streamed = spread(num, len(blocks))
        self._streams = streams
        self._ring = min(ring, num)
        self._flats = [FlatBlock(blocks[index]) for index in self.streamed]
        hold_on_host(self._flats, streams, share)
        self._number = {index: number for number, index in enumerate(self.streamed)}
        self._slots: list[_Slot] = []
        self._slot_of_storage: dict[int, _Slot] = {}
        self._current: int | None = None
        self._forward = False
        self._returns = False
        self._without: frozenset[int] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where the blocks compute."""
        return self._streams.device

    @property
    def host_bytes(self) -> int:
        """What the streamed blocks take in RAM."""
        return sum(flat.num_bytes for flat in self._flats)

    @property
    def ring_bytes(self) -> int:
        """What the ring takes on the device while it exists."""
        return self._ring * max(flat.num_bytes for flat in self._flats)

    @property
    def resident(self) -> tuple[int, ...]:
        """The streamed blocks that are on the device or on their way."""
        numbers = (slot.block for slot in self._slots if slot.block is not None)
        return tuple(sorted(self.streamed[number] for number in numbers))

    @contextmanager
    def forward(self, *, returns: bool, without: Collection[int] = ()) -> Iterator[None]:
        """Say that a forward runs over the blocks; outside of it they run backward.

        Args:
            returns: a backward follows, else another forward.
            without: blocks that this forward leaves out, which need not come.
        """
        self._forward, self._returns = True, returns
        self._without = frozenset(self._number[index] for index in without if index in self._number)
        try:
            yield
        finally:
            self._forward = False
            self._without = frozenset()

    def need(self, index: int) -> None:
        """Make block `index` ready for use, and let those that follow it come.

        What was asked for before counts as used up to here.
        """
        number = self._number.get(index)
        if number is not None and number == self._current:
            return
        self._retire()
        if not self._slots:
            self._make_ring()
        if number is None:
            self._prefetch(self._upcoming_after(index))
            return
        self._prefetch(chain((number,), self._upcoming(number)))
        slot = next(slot for slot in self._slots if slot.block == number)
        if not slot.awaited:
            self._streams.await_copy(slot.arrival)
            slot.awaited = True
        self._flats[number].enter(slot.views[number])
        self._current = number

    def keeping(self) -> AbstractContextManager[object]:
        """Return the context in which a block runs whose tensors are kept for the backward.

        Autograd would keep the ring's buffers; with this it remembers which part of which block it
        needs, and the block is asked for once more.
        """

        def pack(tensor: Tensor) -> Tensor | _Kept:
            slot = self._slot_of_storage.get(tensor.untyped_storage()._cdata)
            if slot is None or slot.block is None:
                return tensor
            start = int(tensor.storage_offset())
            return _Kept(slot.block, tensor.dtype, tensor.shape, tensor.stride(), start)

        def unpack(kept: Tensor | _Kept) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            self.need(self.streamed[kept.block])
            slot = next(slot for slot in self._slots if slot.block == kept.block)
            with torch.inference_mode(mode=False):
                flat = slot.flat.view(kept.dtype)
                return flat.as_strided(kept.shape, kept.stride, kept.offset)

        return saved_tensors_hooks(pack, unpack)

    @contextmanager
    def readable(self, index: int) -> Iterator[None]:
        """Let block `index`, before it runs, hold its tensors where they wait in RAM, to read them.

        A block that is not streamed holds them anyway.
        """
        number = self._number.get(index)
        if number is None:
            yield
            return
        flat = self._flats[number]
        flat.enter(flat.views(flat.host))
        try:
            yield
        finally:
            flat.leave()

    def release(self) -> None:
        """Give the device memory back; the next `need` takes it again."""
        self._retire()
        for slot in self._slots:
            if not slot.awaited:  # its memory may go to the computation, which must come later
                self._streams.await_copy(slot.arrival)
        self._slots = []
        self._slot_of_storage = {}

    def _make_ring(self) -> None:
        size = max(flat.num_bytes for flat in self._flats)
        # Memory made under inference mode could not be used in a training step afterwards.
        with torch.inference_mode(mode=False):
            flats = [self._streams.device_bytes(size) for _ in range(self._ring)]
        used = self._streams.mark_use()
        self._slots = [_Slot(flat, used) for flat in flats]
        self._slot_of_storage = {slot.flat.untyped_storage()._cdata: slot for slot in self._slots}

    def _retire(self) -> None:
        """Take the current block's tensors away and mark the end of their use."""
        if self._current is None:
            return
        self._flats[self._current].leave()
        slot = next(slot for slot in self._slots if slot.block == self._current)
        slot.used = self._streams.mark_use()
        self._current = None

    def _upcoming(self, number: int) -> Iterator[int]:
        """Yield the streamed blocks after `number`, as they will be needed, each at least once."""
        above = (n for n in range(number + 1, len(self._flats)) if n not in self._without)
        if not self._forward:
            return chain(reversed(range(number)), range(len(self._flats)))
        if self._returns:
            return chain(above, reversed(range(len(self._flats))))
        return chain(above, range(len(self._flats)))

    def _upcoming_after(self, index: int) -> Iterator[int]:
        """Yield the streamed blocks after block `index`, which is none of them."""
        below = sum(streamed < index for streamed in self.streamed)
        if self._forward:
            return self._upcoming(below - 1)
        return self._upcoming(below)

    def _prefetch(self, upcoming: Iterator[int]) -> None:
        """Copy those of the next blocks that are missing over those that are needed later."""
        wanted = list(islice(dict.fromkeys(upcoming), self._ring))
        here = {slot.block for slot in self._slots}
        free = (slot for slot in self._slots if slot.block not in wanted)
        for number in wanted:
            if number not in here:
                self._fill(next(free), number)

    def _fill(self, slot: _Slot, number: int) -> None:
        flat = self._flats[number]
        self._streams.await_use(slot.used)
        with torch.inference_mode(mode=False), torch.no_grad():
            slot.arrival = self._streams.copy(slot.flat[: flat.num_bytes], flat.host)
            if number not in slot.views:
                slot.views[number] = flat.views(slot.flat)
        slot.block, slot.awaited = number, False


def hold_on_host(
    flats: Sequence[FlatBlock], streams: Streams, share: HostShare | None = None
) -> None:
    """Take the tensors of blocks over into host memory that copies may run from.

    Args:
        flats: the blocks.
        streams: of the device that the copies go to.
        share: the processes of this machine that hold the same, once, filled by the one that
            leads; then a collective call. None: memory of this process's own.

    Raises:
        RunError: the memory cannot be locked or shared.
    """
    if share is None:
        for flat in flats:
            flat.take(streams.host_bytes(flat.num_bytes))
        return
    sizes = [-(-flat.num_bytes // PAGE) * PAGE for flat in flats]
    layout = "\n".join(flat.layout for flat in flats)

    def fill(memory: Tensor) -> None:
        for flat, part in zip(flats, torch.split(memory, sizes), strict=True):
            flat.take(part[: flat.num_bytes])

    digest = hashlib.sha256(layout.encode()).hexdigest()
    memory = share.memory(sum(sizes), digest, fill)
    for flat, part in zip(flats, torch.split(memory, sizes), strict=True):
        streams.lock(part)
        if not share.leads:
            flat.take(part[: flat.num_bytes], fill=False)


def spread(num: int, total: int) -> tuple[int, ...]:
    """Return `num` of the numbers 0 … `total` - 1, spread evenly."""
    return tuple((2 * k + 1) * total // (2 * num) for k in range(num))
