"""Any schedule of torch's kind of an installed package, by its dotted path."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch.optim.lr_scheduler import LRScheduler

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.options import Options
from trainer.core.dotted import check_arguments, installed_class, made
from trainer.core.seams import BuildContext, LRSchedule

CLASS_KEY = "lr_schedule.class"
ARGUMENTS_KEY = "lr_schedule.arguments"


class Custom(LRSchedule):
    """The course of a subclass of `torch.optim.lr_scheduler.LRScheduler`.

    It is gone through once on a rate of 1, so that the learning rate stays a function of the step,
    and a run that is resumed needs no state of it.
    """

    class Config(Options):
        """Options of `lr_schedule.kind = "custom"`."""

        model_config = ConfigDict(populate_by_name=True)

        path: str = Field(alias="class", pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
        """Class of an installed package, e.g. `torch.optim.lr_scheduler.StepLR`."""
        arguments: dict[str, Any] = Field({})
        """What it is made with, besides the optimizer, e.g. `{step_size = 100}`. Rates in them are
        factors of `optimizer.learning_rate`."""

    def __init__(self, config: Custom.Config, build: BuildContext) -> None:
        """Find the class.

        Raises:
            ConfigError: there is no such class, it is no schedule, or it does not take the
                arguments.
        """
        self.config = config
        self._class = installed_class(config.path, LRScheduler, CLASS_KEY)
        check_arguments(self._class, config.arguments, given=("optimizer",), key=ARGUMENTS_KEY)
        self._course: list[float] = []

    def factor(self, progress: float, num_steps: int) -> float:
        """Return the multiplier at `progress` in [0, 1] of a course of `num_steps`.

        Raises:
            ConfigError: the class refuses the arguments, has fewer steps, or gives rates that are
                not 0 or more.
        """
        if len(self._course) != num_steps:
            self._course = self._gone_through(num_steps)
        return self._course[round(progress * (num_steps - 1))]

    def _gone_through(self, num_steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        schedule = made(self._class, (optimizer,), self.config.arguments, ARGUMENTS_KEY)
        course: list[float] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no optimizer stepped
                for _ in range(num_steps):
                    course.append(float(optimizer.param_groups[0]["lr"]))
                    schedule.step()
        except (TypeError, ValueError) as error:
            if len(course) < num_steps:
                raise _problem(
                    f"{self.config.path} ends after {len(course)} of {num_steps} steps: {error}",
                    ARGUMENTS_KEY,
                ) from error
        if not all(math.isfinite(rate) and rate >= 0 for rate in course):
            raise _problem(f"{self.config.path} gives rates below 0", ARGUMENTS_KEY)
        return course


def _problem(message: str, key: str) -> ConfigError:
    hint = "change the arguments, or use another lr_schedule.kind"
    return ConfigError(problems=[Problem(message, key, hint=hint)])
