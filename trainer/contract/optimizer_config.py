"""Sections of the config for updates of the weights, the learning rate, and their average."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.contract.optimizer_traits import traits_of
from trainer.contract.options import Options
from trainer.contract.plugin_section import PluginSection


class OptimizerSection(PluginSection):
    """How gradients become updates."""

    slots: ClassVar[dict[str, str]] = {"kind": "optimizer"}

    kind: str = "adamw"
    """Optimizer."""
    learning_rate: float = Field(1e-4, gt=0)
    """Step size after the warm-up. Where it is left out, optimizers of another scale take their
    own: 1 with `prodigy`, 3e-5 with `lion` and so on (docs/optimizers.md)."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm over all trained weights; 0 switches it off."""
    max_grad_value: float = Field(0.0, ge=0)
    """After that, each element of the gradients is cut to this size; 0 switches it off."""

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "learning_rate" in values:
            return values
        rate = traits_of(str(values.get("kind", "adamw"))).learning_rate
        usual = cls.model_fields["learning_rate"].default
        return values if rate == usual else {**values, "learning_rate": rate}


class LRScheduleSection(PluginSection):
    """How the learning rate changes over the run."""

    slots: ClassVar[dict[str, str]] = {"kind": "lr_schedule"}

    kind: str = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Instead of `warmup_steps`: share of all steps over which it rises, e.g. 0.05."""

    def warmup_of(self, total_steps: int) -> int:
        """Return the steps of the warm-up in a run of so many."""
        return round(self.warmup_ratio * total_steps) if self.warmup_ratio else self.warmup_steps


class EmaSection(Options):
    """Running average of the trained weights: average ← d · average + (1 - d) · weights."""

    decay: float = Field(0.0, ge=0, lt=1)
    """d, e.g. 0.999; 0: no average is kept."""
    warmup: bool = True
    """The n-th update, from 0, uses (1 + n) / (10 + n) where that is smaller than `decay`."""
    every_steps: int = Field(1, ge=1)
    """Steps between two updates of the average."""
    start_step: int = Field(1, ge=1)
    """First step that is averaged; the average starts as the weights after it."""
    device: Literal["train", "cpu"] = "train"
    """Where it is kept, 4 bytes a weight: beside the trained weights, or in RAM."""
    use_for_samples: bool = True
    """Samples during training are made with the average."""
    use_for_validation: bool = True
    """The validation loss is that of the average."""
