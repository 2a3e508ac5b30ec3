"""Any optimizer class of an installed package, by its dotted path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field

from trainer.contract.options import Options
from trainer.core.dotted import check_arguments, installed_class
from trainer.core.seams import BuildContext, OptimizerFactory

CLASS_KEY = "optimizer.class"
ARGUMENTS_KEY = "optimizer.arguments"


class Custom(OptimizerFactory):
    """A class that is named in the config and made with the arguments that stand there.

    It gets groups of parameters and the learning rate of each step as any optimizer of torch does.
    """

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()

    class Config(Options):
        """Options of `optimizer.kind = "custom"`."""

        model_config = ConfigDict(populate_by_name=True)

        path: str = Field(alias="class", pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
        """Class of an installed package, e.g. `torch.optim.NAdam`."""
        arguments: dict[str, Any] = Field({})
        """What it is made with, besides weights and learning rate, e.g. `{betas = [0.9, 0.99]}`."""

    def __init__(self, config: Custom.Config, build: BuildContext) -> None:
        """Find the class.

        Raises:
            ConfigError: there is no such class, it is no optimizer, or it does not take the
                arguments.
        """
        self.config = config
        self._class = installed_class(config.path, torch.optim.Optimizer, CLASS_KEY)
        check_arguments(self._class, config.arguments, given=("params", "lr"), key=ARGUMENTS_KEY)

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            ConfigError: the class refuses the arguments.
        """
        from trainer.core.dotted import made

        groups = [dict(group) for group in parameters]
        # The engine sets the rate of each step; some classes refuse one of 0 here.
        optimizer: torch.optim.Optimizer = made(
            self._class, (groups,), {**self.config.arguments, "lr": lr or 1e-4}, ARGUMENTS_KEY
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer
