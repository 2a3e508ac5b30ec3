"""Values that layers deep in a model need and that differ from one forward to the next.

A layer is given its input and nothing else. What it needs to know of the forward, such as the
timesteps, is put into a `ForwardValue` before the forward and read by the layer. But parts of a
forward are computed once more in the backward, when another forward may have put other values
there. So whoever recomputes enters `remembered()` of the first time around the second.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor


class ForwardValue:
    """One tensor that is set before a forward and stays until the next one.

    Whoever sets it and whoever reads it share this object. It is a plain attribute, so that a
    compiled block takes it as an input.

    Attributes:
        tensor: the value; None before the first forward.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        _alive.add(self)


_alive: WeakSet[ForwardValue] = WeakSet()


def remembered(
    inner: AbstractContextManager[Any] | None = None,
) -> AbstractContextManager[Any]:
    """Return a context in which all values are what they are now, and again `inner` inside it.

    Without any `ForwardValue` it is `inner` alone.
    """
    inner = nullcontext() if inner is None else inner
    held = [(value, value.tensor) for value in _alive]
    return _Remembered(held, inner) if held else inner


def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what surrounds a part in the forward and in its recomputation, for `checkpoint`."""
    return nullcontext(), remembered()


class _Remembered:
    """Sets values for the length of a block; may be entered again after it was left."""

    def __init__(
        self, held: list[tuple[ForwardValue, Tensor | None]], inner: AbstractContextManager[Any]
    ) -> None:
        self._held = held
        self._inner = inner
        self._before: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._before = [value.tensor for value, _ in self._held]
        for value, tensor in self._held:
            value.tensor = tensor
        self._inner.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            for (value, _), tensor in zip(self._held, self._before, strict=True):
                value.tensor = tensor
