"""Muon: momentum made orthogonal (Jordan 2024; arXiv:2502.16982), by pytorch-optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import Decay
from trainer.optimizers.packages import optimizer_class


class Muon(OptimizerFactory):
    """For matrices; what has another number of dimensions is updated by AdamW."""

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(Options):
        """Options of `optimizer.kind = "muon"`."""

        momentum: float = Field(0.95, ge=0, lt=1)
        """Decay of the mean of gradients."""
        nesterov: bool = True
        """Look a step ahead with the mean."""
        ns_steps: int = Field(5, ge=1, le=20)
        """Newton-Schulz iterations that make the mean orthogonal."""
        lr_adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
        """Factor of the learning rate of a matrix: 0.2·√max(rows, columns), so that rates of AdamW
        do (arXiv:2502.16982), or √max(1, rows / columns) for rates about 0.02."""
        weight_decay: float = Field(0.0, ge=0)
        """Share of each weight that is taken away per step, times the learning rate."""
        adamw_lr_ratio: float = Field(1.0, gt=0)
        """Learning rate of what AdamW updates, as a multiple of the run's."""
        adamw_betas: tuple[Decay, Decay] = (0.9, 0.95)
        """Of AdamW."""
        adamw_eps: float = Field(1e-10, gt=0)
        """Of AdamW."""

    def __init__(self, config: Muon.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer, with each group in two: matrices and the rest.

        Raises:
            ConfigError: pytorch-optimizer is not installed.
        """
        config = self.config
        optimizer = optimizer_class("muon", "Muon")(
            [part for group in parameters for part in self._parts(dict(group), lr)],
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            use_adjusted_lr=config.lr_adjust == "match_rms_adamw",
            weight_decay=config.weight_decay,
            adamw_betas=config.adamw_betas,
            adamw_eps=config.adamw_eps,
            adamw_wd=config.weight_decay,
        )
        return cast("torch.optim.Optimizer", optimizer)

    def _parts(self, group: dict[str, Any], lr: float) -> Iterator[dict[str, Any]]:
        scale = group.get("lr_scale", 1.0)
        for matrices in (True, False):
            members = [p for p in group["params"] if (p.ndim == 2) == matrices]
            own = scale if matrices else scale * self.config.adamw_lr_ratio
            if members:
                yield {
                    **group,
                    "params": members,
                    "use_muon": matrices,
                    "lr": lr,
                    "lr_scale": own,
                }
