"""What a config's optimizer and schedule need of this machine, tried before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import torch

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.optimizer_rules import KIND_KEY
from trainer.contract.optimizer_traits import traits_of
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext, LRSchedule, OptimizerFactory
from trainer.engine.deepspeed import cpu_adam_obstacle
from trainer.jobs.build import build_plugin

_STEPS = 16
"""Of a course that is tried."""


def optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield packages that are missing, and classes and arguments that do not do."""
    kind = config.optimizer.kind
    traits = traits_of(kind)
    if traits.package and importlib.util.find_spec(traits.package) is None:
        yield Problem(
            f"optimizer {kind} needs the package {traits.package}, which is not installed",
            KIND_KEY,
            hint=f"pip install 'menma[{traits.extra}]', or use adamw",
        )
    elif kind == "deepspeed_cpu_adam":  # trying it would compile it
        if (obstacle := cpu_adam_obstacle()) is not None:
            yield Problem(
                f"DeepSpeed's AdamW for the CPU cannot be compiled: {obstacle}",
                KIND_KEY,
                hint="install one (Debian, Ubuntu: g++), or use adamw",
            )
    else:
        yield from _tried(config)


def _tried(config: RunConfig) -> Iterator[Problem]:
    """Yield what goes wrong with two small weights, on the CPU."""
    build = BuildContext(
        variant=next(iter(VARIANTS.values())),
        seed=config.training.seed,
        device=torch.device("cpu"),
        total_steps=_STEPS,
    )
    try:
        factory: OptimizerFactory = build_plugin(config.optimizer, "kind", build, where="optimizer")
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,))]
        factory.build([{"params": weights}], lr=0.0)
    except ConfigError as error:
        yield from (replace(one, key=one.key or KIND_KEY) for one in error.problems)
    try:
        schedule: LRSchedule = build_plugin(config.lr_schedule, "kind", build, where="lr_schedule")
        schedule.factor(0.0, _STEPS)
    except ConfigError as error:
        yield from error.problems
