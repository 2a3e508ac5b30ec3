"""Validation: the loss on fixed items, at fixed timesteps, with fixed noise.

The training loss jumps with every draw of clip, timestep and noise; with all three held fixed, what
is left is the model's own change. At a given timestep the figure is the plain mean squared error of
the velocity: no weighting, no technique, no dropout. Of an item with a mask m, where masks count,
it is Σ m·(v̂ - v)² / Σ m over all of its elements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.contract.errors import DataError, NonFiniteError
from trainer.core.flow import NUM_TRAIN_TIMESTEPS, add_noise, velocity_target
from trainer.core.loss_maps import normalised_map
from trainer.core.rng import derive_seed, generator
from trainer.core.types import Batch, NoisyInput
from trainer.data.buckets import Bucket
from trainer.data.items import TrainingItem
from trainer.data.loader import load_batch
from trainer.data.order import Draw
from trainer.engine.process_group import World
from trainer.sampling.pipeline import evaluating
from trainer.training.step import predict_velocity

_MAX_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSettings:
    """What is measured; all of it but `batch_size` changes the figure."""

    timesteps: tuple[float, ...]
    """In (0, 1000], each once."""
    noises_per_timestep: int = 1
    max_items: int | None = None
    """None: all items."""
    batch_size: int = 1
    seed: int = 42
    use_masks: bool = False
    """Measure what masks mark; items without one, or with a black one, whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationResult:
    """One measurement, the same on every rank."""

    loss: float
    """Mean over items, timesteps and noises."""
    by_timestep: Mapping[float, float]
    """Mean over items and noises, for each timestep in ascending order."""
    num_items: int
    seconds: float


class Validator:
    """Measures the loss of a transformer, in training or on its own.

    The noise of an item depends on the seed, the item's content, the timestep and the number of
    the noise: not on batches, ranks, steps or other items. Nothing is drawn from torch's own
    random streams. Items are dealt out to the ranks; each rank runs the same number of forwards,
    as weights sharded by ZeRO-3 need it. Ranks that share clips get the same items.
    """

    def __init__(
        self,
        transformer: nn.Module,
        items: Sequence[TrainingItem],
        settings: ValidationSettings,
        world: World,
    ) -> None:
        """Choose the items.

        Args:
            transformer: a `WanTransformer` with its adapter, in whatever mode.
            items: cached items; only the first `max_items` in a fixed order are taken.
            settings: what is measured.
            world: this process's place; `World.alone(device)` outside of training.

        Raises:
            DataError: there are no items, or none has a mask where masks count.
        """
        if not items:
            raise DataError("there are no items to validate on")
        self._transformer = transformer
        self._settings = settings
        self._world = world
        self._timesteps = tuple(sorted(set(settings.timesteps)))
        self._items = choose_items(items, settings)
        if settings.use_masks and not any(item.has_mask for item in self._items):
            raise DataError(
                "validation.use_masks is on, and no item that is validated on has a mask",
                hint="set mask_directory or alpha_mask of the sources, or leave use_masks out",
            )
        self._batches = _batches(self._items, settings)

    @property
    def num_items(self) -> int:
        """Items that are measured."""
        return len(self._items)

    def measure(self) -> ValidationResult:
        """Measure now. A collective call.

        Raises:
            NonFiniteError: on every rank, the loss of some item is NaN or infinite.
            DataError: an entry of the cache is missing or damaged.
        """
        started = time.monotonic()
        noises = self._settings.noises_per_timestep
        losses_ITN = torch.zeros(len(self._items), len(self._timesteps), noises)
        world = self._world
        rounds = -(-len(self._batches) // world.data_size)
        with evaluating(self._transformer), torch.no_grad():
            for number in range(rounds):
                place = number * world.data_size + world.data_rank
                # Past the end: run what another rank runs, too, and do not count it.
                rows = self._batches[min(place, len(self._batches) - 1)]
                batch = load_batch([Draw(self._items[row], 0, 0, 0) for row in rows])
                losses_BTN = self._losses(batch.to(world.device), rows)
                if place < len(self._batches) and world.counts:
                    losses_ITN[rows] = losses_BTN
        # Each entry is zero on all ranks but one, so that this sum is exact.
        losses_ITN = world.gather(losses_ITN).sum(dim=0).cpu().view_as(losses_ITN).double()
        self._require_finite(losses_ITN)
        by_timestep_T = losses_ITN.mean(dim=(0, 2)).tolist()
        return ValidationResult(
            loss=losses_ITN.mean().item(),
            by_timestep=dict(zip(self._timesteps, by_timestep_T, strict=True)),
            num_items=len(self._items),
            seconds=time.monotonic() - started,
        )

    def _losses(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Return the loss of every item at every timestep for every noise, on the CPU."""
        return torch.stack(
            [
                torch.stack(
                    [
                        self._loss(batch, rows, timestep, number)
                        for number in range(self._settings.noises_per_timestep)
                    ],
                    dim=-1,
                )
                for timestep in self._timesteps
            ],
            dim=1,
        ).cpu()

    def _loss(self, batch: Batch, rows: Sequence[int], timestep: float, number: int) -> Tensor:
        latents = batch.latents_BCFHW.float()
        noise = torch.stack(
            [
                item_noise(
                    self._items[row], latents.shape[1:], timestep, number, self._settings.seed
                )
                for row in rows
            ]
        ).to(latents.device)
        sigma = torch.full((len(rows),), timestep / NUM_TRAIN_TIMESTEPS, device=latents.device)
        noisy = NoisyInput(
            noisy_latents_BCFHW=add_noise(latents, noise, sigma), sigma_B=sigma, noise_BCFHW=noise
        )
        velocity = predict_velocity(self._transformer, noisy, batch).float()
        squares = (velocity - velocity_target(latents, noise)).square()
        if self._settings.use_masks and batch.mask_B1FHW is not None:
            squares = squares * _counted(batch.mask_B1FHW)
        return squares.flatten(1).mean(dim=1)

    def _require_finite(self, losses_ITN: Tensor) -> None:
        wrong = (~losses_ITN.isfinite()).nonzero().tolist()
        if not wrong:
            return
        named = dict.fromkeys(
            f"{self._items[item].name} at timestep {self._timesteps[place]:g}"
            for item, place, _ in wrong
        )
        listed = ", ".join(list(named)[:_MAX_NAMED])
        more = len(named) - _MAX_NAMED
        raise NonFiniteError(
            f"the validation loss is NaN or infinite for {listed}"
            + (f" and {more} more" if more > 0 else ""),
            hint="look at these clips and their captions; if they are fine, lower the learning "
            "rate or set memory.weight_format = 'fp32'",
        )


def together(results: Sequence[ValidationResult]) -> ValidationResult:
    """Return measurements of the same items at different timesteps as one."""
    by_timestep = {t: loss for result in results for t, loss in result.by_timestep.items()}
    return ValidationResult(
        loss=sum(by_timestep.values()) / len(by_timestep),
        by_timestep=dict(sorted(by_timestep.items())),
        num_items=results[0].num_items,
        seconds=sum(result.seconds for result in results),
    )


def item_noise(
    item: TrainingItem, shape: Sequence[int], timestep: float, number: int, seed: int
) -> Tensor:
    """Return the noise of an item at a timestep: float32 on the CPU, the `number`-th of it."""
    random = generator(seed, "validation", "noise", item.identity, str(float(timestep)), number)
    return torch.randn(tuple(shape), generator=random)


def choose_items(
    items: Sequence[TrainingItem], settings: ValidationSettings
) -> tuple[TrainingItem, ...]:
    """Return the items that are measured, in a fixed order.

    With `max_items`, those whose hash is smallest: another clip in the dataset moves one item of
    the choice at most.
    """

    def place(item: TrainingItem) -> tuple[int, str]:
        return derive_seed(settings.seed, "validation", "choice", item.identity), item.key

    return tuple(sorted(items, key=place)[: settings.max_items])


def _batches(items: Sequence[TrainingItem], settings: ValidationSettings) -> list[list[int]]:
    """Return the rows of `items` that run together: of one bucket, `batch_size` at most.

    Where masks count, those with and without one do not mix.
    """
    rows: dict[tuple[Bucket, bool], list[int]] = {}
    for row, item in enumerate(items):
        kind = item.bucket, settings.use_masks and item.has_mask
        rows.setdefault(kind, []).append(row)
    size = settings.batch_size
    return [
        rows[kind][start : start + size]
        for kind in sorted(rows)
        for start in range(0, len(rows[kind]), size)
    ]


def _counted(mask_B1FHW: Tensor) -> Tensor:
    """Return what each element of the loss is multiplied with, of mean 1 over each item."""
    black_B = mask_B1FHW.flatten(1).amax(dim=1) == 0
    black_B1FHW = black_B.view(-1, *([1] * (mask_B1FHW.dim() - 1)))
    return normalised_map(mask_B1FHW.masked_fill(black_B1FHW, 1.0))
