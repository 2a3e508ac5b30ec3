"""The frozen tensors of one block as one flat stretch of bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes: what CUDA's allocator aligns to, and more than any kernel asks for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a block lies, and whose it is."""

    module: nn.Module
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        """Return the tensor in a copy of the block, uint8 (bytes,)."""
        part = flat[self.offset : self.offset + self.num_bytes]
        return part.view(self.dtype).view(self.shape)


class FlatBlock:
    """A block whose frozen parameters and buffers live in one host buffer.

    They are no longer parameters or buffers of their modules but plain attributes: whatever moves,
    broadcasts, shards or saves a model's parameters passes them by, which for frozen weights that
    are not on the device is what it must do. While the block is absent the attributes are tensors
    without memory, so that using them is an error and not a wrong number.

    What is trained, and what is added to the block later (LoRA), stays as it is.

    Attributes:
        num_bytes: of the host buffer.
        host: the host buffer, uint8 (num_bytes,), once there is one.
    """

    host: Tensor

    def __init__(self, block: nn.Module, *, without: nn.Module | None = None) -> None:
        """Lay the tensors out; `take` takes them over.

        Args:
            block: on the host, best not pinned: its own memory is given up tensor by tensor. On
                the meta device where the host buffer is filled by somebody else.
            without: a part of `block` that is left as it is.
        """
        offset = 0
        self._places: list[Place] = []
        for module, name, tensor in _frozen(
            block, set() if without is None else {*without.modules()}
        ):
            place = Place(module, name, tensor.dtype, tuple(tensor.shape), offset)
            self._places.append(place)
            offset += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = offset
        self._absent = [
            torch.empty(place.shape, dtype=place.dtype, device="meta") for place in self._places
        ]

    @property
    def layout(self) -> str:
        """What lies where, in words."""
        return " ".join(f"{p.offset}:{p.name}:{p.dtype}{list(p.shape)}" for p in self._places)

    def take(self, host: Tensor, *, fill: bool = True) -> None:
        """Take the tensors over into a host buffer, uint8 (num_bytes,).

        Args:
            host: the buffer; it must live on.
            fill: write them; else the buffer holds, or will hold, the same already.
        """
        self.host = host
        for place in self._places:
            tensor = getattr(place.module, place.name).detach()
            delattr(place.module, place.name)
            if fill:
                place.view(host).copy_(tensor)
        self.leave()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return the tensors in a copy of the block."""
        return [place.view(flat) for place in self._places]

    def enter(self, tensors: list[Tensor]) -> None:
        """Let the block compute with `tensors`, which `views` returned."""
        for place, tensor in zip(self._places, tensors, strict=True):
            place.module.__dict__[place.name] = tensor

    def leave(self) -> None:
        """Take the tensors away from the block."""
        self.enter(self._absent)


def _frozen(
    block: nn.Module, without: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in block.modules():
        if module in without:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield module, name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, buffer
