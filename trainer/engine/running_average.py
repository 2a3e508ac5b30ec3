"""A running average of the trained weights, kept where an engine keeps those (weight EMA).

The average has the engine's own layout: each rank averages the stretches that it updates, so that
nothing is gathered, and weights that ZeRO shards have a sharded average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageSettings:
    """How weights are averaged: `average <- d * average + (1 - d) * weights`."""

    decay: float
    """d in (0, 1) once it has warmed up."""
    warmup: bool = True
    """d of the n-th update (from 0) is (1 + n) / (10 + n) at most."""
    every_steps: int = 1
    """Steps of the optimizer between two updates."""
    start_step: int = 1
    """The first step that is averaged; the average starts as the weights after it."""
    device: Literal["train", "cpu"] = "train"
    """Where it is kept: beside the weights, or in RAM."""

    def decay_at(self, update: int) -> float:
        """Return d of update number `update`; the first one, 0, takes the weights as they are."""
        if update == 0:
            return 0.0
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


class RunningAverage:
    """The average of what an engine trains.

    Attributes:
        tensors: one for each flat of the engine, of its shape, float32.
        steps: of the optimizer that it has seen.
        updates: that were made; with none, there is no average yet.
    """

    def __init__(self, settings: AverageSettings, flats: Sequence[Tensor]) -> None:
        self.settings = settings
        self.tensors = [
            torch.zeros_like(
                flat,
                dtype=torch.float32,
                device="cpu" if settings.device == "cpu" else flat.device,
                requires_grad=False,
            )
            for flat in flats
        ]
        self.steps = 0
        self.updates = 0

    @property
    def started(self) -> bool:
        """Whether something was averaged yet."""
        return self.updates > 0

    @torch.no_grad()
    def after_step(self, flats: Sequence[Tensor]) -> None:
        """Take in the weights after a step of the optimizer, where it is due."""
        self.steps += 1
        since = self.steps - self.settings.start_step
        if since < 0 or since % self.settings.every_steps:
            return
        decay = self.settings.decay_at(self.updates)
        for average, flat in zip(self.tensors, flats, strict=True):
            average.lerp_(flat.detach().to(average), 1 - decay)
        self.updates += 1

    @contextmanager
    def in_place_of(self, flats: Sequence[Tensor]) -> Iterator[None]:
        """Have the average in the flats for the duration of a block; then the same bits again."""
        with kept(flats):
            for average, flat in zip(self.tensors, flats, strict=True):
                flat.detach().copy_(average)
            yield


@contextmanager
def kept(flats: Sequence[Tensor]) -> Iterator[None]:
    """Put back the same bits into the flats after a block that changes them."""
    with torch.no_grad():
        copies = [flat.detach().clone() for flat in flats]
    try:
        yield
    finally:
        with torch.no_grad():
            for flat, copy in zip(flats, copies, strict=True):
                flat.detach().copy_(copy)
