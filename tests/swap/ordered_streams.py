"""A device that is late: it notices every use that nothing makes wait.

The computation runs in operators; each is a tick of the compute queue's clock. What an operator
reads is seen from outside the ring's own books, by the storages of its arguments, in forward and
backward alike. A read of memory whose last copy was not awaited, and a copy over memory whose last
read the copy queue was not told to wait for, are faults: on a GPU both would be silent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainer.memory.streams import HostStreams

_JUST_LOOKING = ("view", "slice", "as_strided", "detach", "alias", "empty", "t.default")


class OrderedStreams(HostStreams):
    """`HostStreams` whose queues run independently, as far as their marks allow."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.copy_queue_at = 0
        self.last_read: dict[int, int] = {}
        self.arriving: dict[int, int] = {}
        self.faults: list[str] = []
        self.memory: dict[int, Tensor] = {}
        self.reads = 0
        self.busy = False

    def device_bytes(self, num: int) -> Tensor:
        memory = super().device_bytes(num)
        memory.fill_(0xFF)  # NaN in every float format
        self.memory[memory.untyped_storage()._cdata] = memory
        return memory

    def copy(self, target: Tensor, source: Tensor) -> int:
        key = target.untyped_storage()._cdata
        if key in self.memory and self.last_read.get(key, -1) > self.copy_queue_at:
            self.faults.append(f"copy {self.copies} overwrites what is still read")
        key_of_source = source.untyped_storage()._cdata
        if key_of_source in self.arriving:
            self.faults.append(f"copy {self.copies} reads what has not arrived")
        self.busy = True
        super().copy(target, source)
        self.busy = False
        self.arriving[key] = self.copies
        return self.copies

    def await_copy(self, mark: int) -> None:
        self.arriving = {key: copy for key, copy in self.arriving.items() if copy > mark}

    def mark_use(self) -> int:
        return self.clock

    def await_use(self, mark: int) -> None:
        self.copy_queue_at = max(self.copy_queue_at, mark)

    def see(self, operator: Any, tensors: Any) -> None:
        """One operator of the computation."""
        if self.busy:
            return
        name = str(operator)
        self.clock += 1
        if any(part in name for part in _JUST_LOOKING):
            return
        for tensor in tree_iter(tensors):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            key = tensor.untyped_storage()._cdata
            if key not in self.memory:
                continue
            self.reads += 1
            self.last_read[key] = self.clock
            if key in self.arriving:
                self.faults.append(f"{name} reads before copy {self.arriving[key]} arrived")


class Watch(TorchDispatchMode):
    """Shows all operators to `OrderedStreams`."""

    def __init__(self, streams: OrderedStreams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.streams.see(func, (args, kwargs))
        return func(*args, **(kwargs or {}))


def forget_waits(streams: OrderedStreams, what: str) -> None:
    """Break the ring's manners, to see that the watch notices."""
    setattr(streams, what, lambda mark: None)


assert torch.tensor(0xFF, dtype=torch.uint8).repeat(4).view(torch.float32).isnan().all()
