"""The section `[validation]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from trainer.contract.intervals import Repeated

if TYPE_CHECKING:
    from trainer.contract.dataset_config import GeneralOptions, SourceOptions


class ValidationSection(Repeated):
    """The loss on clips that are not trained on, at fixed timesteps and with fixed noise."""

    every_steps: int = Field(0, ge=0)
    """Steps between measurements; 0: none. Where there are some, one follows the last step."""
    every_epochs: int = Field(0, ge=0)
    """Epochs between measurements, beside those of `every_steps`; 0: epochs do not count."""
    at_start: bool = True
    """With an interval: measure before the first step, too."""
    split: float = Field(0.0, ge=0, lt=1)
    """Share of the dataset's clips held out of training, chosen by their content; 0: none."""
    sources: tuple[dict[str, Any], ...] = ()
    """`[[validation.sources]]`: clips of their own, keys as in `[[dataset.sources]]`."""
    timesteps: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(
        (100.0, 300.0, 500.0, 700.0, 900.0), min_length=1, max_length=100
    )
    """Timesteps (0 clean, 1000 noise) at which each item is measured."""
    noises_per_timestep: int = Field(1, ge=1)
    """Different noises for each item and timestep; more make the figure less noisy."""
    max_items: int | None = Field(None, ge=1)
    """Measure no more than this many items, the same ones each time; empty: all."""
    batch_size: int = Field(1, ge=1)
    """Items of one forward; changes the speed only."""
    use_masks: bool = False
    """Measure what the items' masks mark, and not the whole frame; an item without a mask, or with
    one that is all black, counts whole."""
    seed: int = Field(42, ge=0)
    """Fixes which clips are held out and the noise, whatever `training.seed` is."""

    def load_sources(self, general: GeneralOptions) -> tuple[SourceOptions, ...]:
        """Return `sources`, checked; what one does not set itself is the dataset's `general`.

        Raises:
            ConfigError: a key is wrong.
        """
        from trainer.contract.dataset_config import parse_dataset

        if not self.sources:
            return ()
        shared = general.model_dump(exclude_unset=True)
        values = {"general": shared, "sources": list(self.sources)}
        return parse_dataset(values, prefix="validation.").sources

    @field_validator("timesteps", mode="after")
    @classmethod
    def _ascending(cls, timesteps: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(timesteps)))
