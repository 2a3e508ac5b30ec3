"""Models of which one works at a time: the weights of the others wait in RAM.

Frozen weights never change. So each model keeps a copy of its own in RAM, pinned where there is a
GPU, and its turn is one copy to the device over the weights of the one before it, into the same
memory: the device never holds two of them, nothing is copied back, and nothing is allocated.

Trained parameters, and whatever is added to a model later (LoRA), stay where they are. Blocks that
block swap streams are held by it, and pass through a ring of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.memory.block_swap import BlockSwap, hold_on_host
from trainer.memory.flat_block import FlatBlock
from trainer.memory.host_share import HostShare
from trainer.memory.streams import Streams


@dataclass(frozen=True, slots=True)
class Parked:
    """The frozen tensors of one model, laid out a block at a time."""

    flats: tuple[FlatBlock, ...]
    swap: BlockSwap | None

    @classmethod
    def of(cls, model: nn.Module, blocks: nn.ModuleList, swap: BlockSwap | None) -> Parked:
        """Lay out what `model` has now; `OneAtATime` takes it over.

        Args:
            model: frozen, before anything is added to it.
            blocks: the part of it that most weights are in.
            swap: streams some of them; these are left to it.
        """
        flats = [FlatBlock(block) for block in blocks]
        flats.append(FlatBlock(model, without=blocks))
        return cls(tuple(flat for flat in flats if flat.num_bytes), swap)

    @property
    def num_bytes(self) -> int:
        """What it takes in RAM, and on the device in its turn."""
        return sum(flat.num_bytes for flat in self.flats)


class OneAtATime:
    """Lets one of several models be on the device.

    Attributes:
        working: the name of the model that is there; None: none has been asked for yet.
    """

    def __init__(self, streams: Streams) -> None:
        """Prepare for models on one device; add them with `add`."""
        self.working: str | None = None
        self._streams = streams
        self._parked: dict[str, Parked] = {}
        self._memory: list[Tensor] = []

    @property
    def host_bytes(self) -> Mapping[str, int]:
        """What each model takes in RAM."""
        return {name: parked.num_bytes for name, parked in self._parked.items()}

    def add(self, name: str, parked: Parked, share: HostShare | None = None) -> None:
        """Take a model's frozen tensors over into RAM; it waits there.

        Args:
            name: of the model.
            parked: its layout, from before it got what is trained.
            share: as in `block_swap.hold_on_host`; then a collective call.

        Raises:
            RunError: the RAM cannot be locked or shared.
        """
        hold_on_host(parked.flats, self._streams, share)
        if parked.swap is not None:
            parked.swap.release()
        self._parked[name] = parked

    def bring(self, name: str) -> None:
        """Have model `name` on the device, ready to compute; the one before it is put away."""
        if name == self.working:
            return
        self._put_away()
        parked = self._parked[name]
        self._make_room()
        # What the model before has been given to compute must be done with its weights.
        self._streams.await_use(self._streams.mark_use())
        arrivals = []
        for flat, memory in zip(parked.flats, self._memory, strict=False):
            with torch.inference_mode(mode=False), torch.no_grad():
                arrivals.append(self._streams.copy(memory[: flat.num_bytes], flat.host))
                flat.enter(flat.views(memory))
        for arrival in arrivals:
            self._streams.await_copy(arrival)
        self.working = name

    def _put_away(self) -> None:
        if self.working is None:
            return
        parked = self._parked[self.working]
        for flat in parked.flats:
            flat.leave()
        if parked.swap is not None:
            parked.swap.release()
        self.working = None

    def _make_room(self) -> None:
        """Have memory for the largest model, block by block; made at the first turn."""
        if self._memory:
            return
        models = [[flat.num_bytes for flat in one.flats] for one in self._parked.values()]
        counts = range(max(map(len, models)))
        sizes = [max(model[i] for model in models if i < len(model)) for i in counts]
        # Memory made under inference mode could not be used in a training step afterwards.
        with torch.inference_mode(mode=False):
            self._memory = [self._streams.device_bytes(size) for size in sizes]
