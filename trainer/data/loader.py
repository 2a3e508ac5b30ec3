"""From the order to batches of tensors, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from trainer.core.types import Batch
from trainer.data.entries import read_entry, read_whole_entry
from trainer.data.items import CachedDataset
from trainer.data.order import BatchOrder, Draw


def load_batch(draws: Sequence[Draw], *, pin_memory: bool = False) -> Batch:
    """Read the items of one microbatch from their caches.

    Raises:
        DataError: an entry is missing, damaged, or not the one the index means.
    """
    entries = [read_entry(draw.item.latents, draw.item.latents_key) for draw in draws]
    texts = [read_whole_entry(*draw.context) for draw in draws]
    batch = Batch(
        latents_BCFHW=torch.stack([entry["latents"] for entry in entries]),
        context=tuple(tensors["context"] for tensors, _ in texts),
        captions=tuple(metadata.get("caption", "") for _, metadata in texts),
        extra_channels_BCFHW=_stack(entries, "extra_channels"),
        image_context_BTD=_stack(entries, "image_context"),
        names=tuple(draw.item.name for draw in draws),
        sources=tuple(draw.item.source for draw in draws),
        item_seeds=tuple(draw.seed for draw in draws),
        quantiles=tuple(draw.quantile for draw in draws),
        mask_B1FHW=_stack(entries, "mask"),
        loss_weight_B=_loss_weights(draws),
    )
    return _pinned(batch) if pin_memory else batch


def load_text(dataset: CachedDataset, text: str) -> Tensor:
    """Return one of `dataset.texts`, encoded, (T, D) float32.

    Raises:
        DataError: it is missing or damaged.
    """
    return read_entry(*dataset.texts[text])["context"]


class BatchLoader:
    """An iterator over one rank's microbatches, endless; read ahead in the background.

    Use as a context manager, or call `close`: the thread ends then. An error while reading comes
    out of `next`, in its turn.
    """

    def __init__(
        self,
        order: BatchOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Begin to read.

        Args:
            order: the stream all ranks share.
            rank: of this process.
            world_size: number of processes.
            start: microbatches that each rank has had already.
            prefetch: batches that are kept ready at most.
            pin_memory: put tensors into page-locked memory, for copies that overlap.
        """
        self._order = order
        self._positions = range(start * world_size + rank, 1 << 62, world_size)
        self._pin_memory = pin_memory
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(max(1, prefetch))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="menma-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        batch = self._ready.get()
        if isinstance(batch, Exception):
            self.close()
            raise batch
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and drop what was read ahead."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()

    def _read(self) -> None:
        for position in self._positions:
            try:
                batch: Batch | Exception = load_batch(
                    self._order.batch(position), pin_memory=self._pin_memory
                )
            except Exception as error:  # noqa: BLE001 - raised again in __next__
                batch = error
            if not self._put(batch) or isinstance(batch, Exception):
                return

    def _put(self, batch: Batch | Exception) -> bool:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._ready.put(batch, timeout=0.1)
                return True
        return False


class TrainingSteps:
    """One rank's data, cut into steps of several microbatches (`loop.Steps`)."""

    def __init__(
        self,
        order: BatchOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.order = order
        self._rank = rank
        self._world_size = world_size
        self._accumulation = gradient_accumulation_steps
        self._pin_memory = pin_memory

    def starting_at(self, step: int) -> Generator[list[Batch], None, None]:
        """Yield this rank's microbatches of step `step` + 1, then of the next ones."""
        with BatchLoader(
            self.order,
            rank=self._rank,
            world_size=self._world_size,
            start=step * self._accumulation,
            pin_memory=self._pin_memory,
        ) as loader:
            while True:
                yield [next(loader) for _ in range(self._accumulation)]

    def steps_for_epochs(self, epochs: int) -> int:
        """Return the steps that see every microbatch of `epochs` epochs."""
        per_step = self._world_size * self._accumulation
        return -(-epochs * self.order.batches_per_epoch // per_step)

    def epoch_after(self, step: int) -> float:
        """Return how many epochs have been seen after `step` steps."""
        seen = step * self._world_size * self._accumulation
        return seen / self.order.batches_per_epoch


def _stack(entries: Sequence[dict[str, Tensor]], name: str) -> Tensor | None:
    tensors = [entry[name] for entry in entries if name in entry]
    return torch.stack(tensors) if tensors else None


def _loss_weights(draws: Sequence[Draw]) -> Tensor | None:
    weights = [draw.item.loss_weight for draw in draws]
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights)


def _pinned(batch: Batch) -> Batch:
    def pin(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.pin_memory()

    return replace(
        batch,
        latents_BCFHW=batch.latents_BCFHW.pin_memory(),
        context=tuple(context.pin_memory() for context in batch.context),
        extra_channels_BCFHW=pin(batch.extra_channels_BCFHW),
        image_context_BTD=pin(batch.image_context_BTD),
        mask_B1FHW=pin(batch.mask_B1FHW),
        loss_weight_B=pin(batch.loss_weight_B),
    )
