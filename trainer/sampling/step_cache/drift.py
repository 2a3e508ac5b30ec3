"""How wrong it would be to use again what the blocks did at an earlier step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from trainer.contract.denoising_options import DenoisingOptions
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.step_cache.values import ExpertValues, Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Of one expert in one video; steps count from the expert's first one."""

    estimate: Callable[[str, int, int], float]
    """Given a pass, the step it was computed at and the step it is wanted at."""
    threshold: float
    """Estimates below it are small enough."""
    max_skips: int | None
    """Steps in a row without a computation; None: any number."""
    first: int
    """Steps before this one are computed."""
    last: int
    """Steps from this one on are computed."""

    def allows(self, name: str, since: int, index: int) -> bool:
        """Return whether step `index` may use what pass `name` computed at step `since`."""
        if not self.first <= index < self.last:
            return False
        if self.max_skips is not None and index - since > self.max_skips:
            return False
        return self.estimate(name, since, index) < self.threshold


class StepCacheMethod(Protocol):
    """Estimates drift, from what is known of a model."""

    @staticmethod
    def lacks(options: DenoisingOptions, values: ExpertValues, names: Collection[str]) -> bool:
        """Return whether something is not known that the passes `names` need."""
        ...

    @staticmethod
    def drift(
        options: DenoisingOptions,
        values: ExpertValues,
        transformer: nn.Module,
        timesteps_S: Tensor,
    ) -> Drift:
        """Return the drift of an expert.

        Args:
            options: of the video; its fields win over what the method prefers.
            values: what is known of the expert.
            transformer: the expert, on its device.
            timesteps_S: of the steps it makes.
        """
        ...


def first_step(share: float | None, num_steps: int, otherwise: int) -> int:
    """Return the first step that may be reused; step 0 never is."""
    return max(1, otherwise if share is None else round(share * num_steps))


def input_distances(transformer: nn.Module, timesteps_S: Tensor, form: Form) -> list[float]:
    """Return mean |f_i - f_(i-1)| / mean |f_(i-1)| of the timestep's features; 0 for the first."""
    head_SD, blocks_SE = cast(WanTransformer, transformer).time_features(timesteps_S)
    features = (head_SD if form == "plain" else blocks_SE).float()
    change_S = (features[1:] - features[:-1]).abs().mean(1)
    size_S = features[:-1].abs().mean(1)
    distances: list[float] = (change_S / size_S).tolist()
    return [0.0, *distances]
