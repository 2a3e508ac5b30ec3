"""What of the loss and the weights is told now and then: too much for every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trainer.core.flow import NUM_TRAIN_TIMESTEPS
from trainer.core.types import Batch
from trainer.engine.process_group import World

NUM_BANDS = 10
"""Equal parts of the timesteps 0 … 1000."""


class LossDetails:
    """Means of the loss by source and by part of the timesteps, since they were last told.

    The loss is that of `objective.loss` with the data's own weights and without the weighting by
    sigma, so that parts of the timesteps can be compared.

    Args:
        sources: names of the dataset's sources, by their numbers.
        world: sums are added up over all processes.
        every_steps: when they are told; 0: never.
    """

    def __init__(self, sources: Sequence[str], world: World, every_steps: int) -> None:
        self._sources, self._world, self._every = list(sources), world, every_steps
        self._sums = self._nothing()

    def observe(self, batch: Batch, sigma_B: Tensor, loss_B: Tensor) -> None:
        """Take in the loss of each item, float32; nothing waits for the device."""
        if not self._every:
            return
        sums = self._sums = self._sums.to(loss_B.device)
        both = torch.stack([loss_B.detach().double(), torch.ones_like(loss_B).double()], dim=1)
        bands = (sigma_B * NUM_BANDS).long().clamp(0, NUM_BANDS - 1).to(loss_B.device)
        sources = torch.tensor(batch.sources, device=loss_B.device) + NUM_BANDS
        sums.index_add_(0, bands, both)
        if batch.sources:
            sums.index_add_(0, sources, both)

    def __call__(self, step: int) -> dict[str, dict[str, float]]:
        """Return the fields of a step event where this step tells them. A collective call."""
        if not self._every or step % self._every:
            return {}
        gathered = self._world.gather(self._sums.flatten()).double().sum(dim=0).view(-1, 2).cpu()
        self._sums = self._nothing()
        width = NUM_TRAIN_TIMESTEPS // NUM_BANDS
        bands = [f"{width * number}-{width * (number + 1)}" for number in range(NUM_BANDS)]
        means = {
            name: round(float(total / count), 6)
            for name, (total, count) in zip([*bands, *self._sources], gathered, strict=True)
            if count
        }
        return {
            "by_timestep": {name: means[name] for name in bands if name in means},
            "by_source": {name: means[name] for name in self._sources if name in means},
        }

    def _nothing(self) -> Tensor:
        return torch.zeros(NUM_BANDS + len(self._sources), 2, dtype=torch.float64)


def weight_norms(
    step: int, *, every_steps: int, parameters: Callable[[], Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Return L2 norms of what is trained where this step tells them. A collective call.

    Args:
        step: the step.
        every_steps: when they are told; 0: never.
        parameters: `Engine.full_parameters`.
    """
    if not every_steps or step % every_steps:
        return {}
    norms = [float(value.double().norm()) for value in parameters().values()]
    if not norms:  # not rank 0, which speaks
        return {}
    total = sum(norm * norm for norm in norms) ** 0.5
    return {
        "weight_norm": {
            "total": round(total, 6),
            "mean": round(sum(norms) / len(norms), 6),
            "largest": round(max(norms), 6),
        }
    }
