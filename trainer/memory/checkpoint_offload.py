"""What checkpointing keeps of each block, the tokens that enter it, waits in RAM.

Copies run beside the computation: out while the next block runs, and back while the block above
runs backward. Nothing is rounded, so the loss is the same to the bit.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.memory.streams import Mark, Streams


class _Parked:
    """One tensor in RAM, and the one that was parked before it."""

    def __init__(self, tensor: Tensor, host: Tensor, left: Mark, before: _Parked | None) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.num_bytes = tensor.numel() * tensor.element_size()
        self.host = host
        self.left = left
        self.on_device: Tensor | None = tensor
        self.arrival: Mark = None
        self.awaited = True
        # Weak: a forward whose backward never came must not be kept by the next one.
        self.before = None if before is None else weakref.ref(before)


class CheckpointOffload:
    """Parks block inputs in the host's memory until the backward comes to them.

    A parked tensor leaves the device one block later, when its copy must be done; on its way back
    it arrives while the block above runs backward. So about three of them are on the device.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._spare: dict[int, list[Tensor]] = {}
        self._last: weakref.ref[_Parked] | None = None

    def parking(self, tokens_BLD: Tensor) -> AbstractContextManager[object]:
        """Return the context in which a checkpoint of a block with this input is made."""
        size = tokens_BLD.shape

        def pack(tensor: Tensor) -> Tensor | _Parked:
            return self._park(tensor) if tensor.shape == size else tensor

        def unpack(kept: Tensor | _Parked) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._fetch(kept)

        return saved_tensors_hooks(pack, unpack)

    def _park(self, tensor: Tensor) -> _Parked:
        before = self._last() if self._last is not None else None
        if before is not None:
            self._let_go(before)
        tensor = tensor.detach().contiguous()
        num = tensor.numel() * tensor.element_size()
        spare = self._spare.setdefault(num, [])
        host = spare.pop() if spare else self._streams.host_bytes(num)
        self._streams.await_use(self._streams.mark_use())
        with torch.no_grad():
            left = self._streams.copy(host, tensor.view(-1).view(torch.uint8))
        parked = _Parked(tensor, host, left, before)
        # Copies of one queue follow one another: what is parked here next waits for this one.
        weakref.finalize(parked, spare.append, host)
        self._last = weakref.ref(parked)
        return parked

    def _let_go(self, parked: _Parked) -> None:
        """Give up the device memory of what is in RAM by now."""
        if parked.on_device is not None:
            self._streams.await_copy(parked.left)
            parked.on_device = None

    def _fetch(self, parked: _Parked) -> Tensor:
        self._bring(parked)
        before = parked.before() if parked.before is not None else None
        if before is not None:
            self._bring(before)
        if not parked.awaited:
            self._streams.await_copy(parked.arrival)
            parked.awaited = True
        tensor = parked.on_device
        if tensor is None:
            raise RuntimeError("a parked tensor did not come back")
        # Autograd holds it as long as the recomputation needs it; a second backward fetches anew.
        if parked.arrival is not None:
            parked.on_device = None
        return tensor

    def _bring(self, parked: _Parked) -> None:
        if parked.on_device is not None:
            return
        flat = self._streams.device_bytes(parked.num_bytes)
        self._streams.await_use(self._streams.mark_use())
        with torch.no_grad():
            parked.arrival = self._streams.copy(flat, parked.host)
        parked.on_device = flat.view(parked.dtype).view(parked.shape)
        parked.awaited = False
