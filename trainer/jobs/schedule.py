"""The job `schedule`: the learning rate of every step of a run, without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.contract.config import RunConfig
from trainer.contract.config_io import load_config_with_sources, place_problems
from trainer.contract.errors import ConfigError
from trainer.contract.experts import SHARED, for_expert, trained_experts, trains_both
from trainer.contract.jobs import ScheduleRequest
from trainer.contract.variants import VARIANTS, Variant
from trainer.core.seams import Adapter, BuildContext
from trainer.jobs.base import Emit
from trainer.jobs.build import build_plugin
from trainer.jobs.components import settle_variant
from trainer.jobs.expert_share import settle_turns
from trainer.jobs.train_parts import learning_rate

MOST_POINTS = 1000
"""Of a curve; longer runs are told at so many steps or a few
more, the first and the last among them."""

_MARKED = (0.25, 0.5, 0.75)
"""Shares of the run at which the rate is told in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The learning rate of what one optimizer trains."""

    name: str
    """The expert; empty where there is one transformer."""
    steps: int
    """Updates it makes."""
    warmup_steps: int
    rate: Callable[[int], float]

    def points(self) -> list[tuple[int, float]]:
        """Return steps and learning rates."""
        if self.steps <= MOST_POINTS:
            wanted = list(range(1, self.steps + 1))
        else:
            span = self.steps - 1
            even = {1 + round(i * span / (MOST_POINTS - 1)) for i in range(MOST_POINTS)}
            marked = {self.warmup_steps, *(round(self.steps * share) for share in _MARKED)}
            wanted = sorted(even | (marked - {0}))
        return [(step, self.rate(step)) for step in wanted]


def run(request: ScheduleRequest, emit: Emit) -> None:
    """Job `schedule`; its `end` event has the courses.

    Raises:
        ConfigError: the config is wrong, or does not say how many steps there are.
    """
    loaded = load_config_with_sources(request.config, request.set)
    try:
        courses = [_told(course) for course in courses_of(loaded.config, request.steps)]
    except ConfigError as error:
        problems = place_problems(error.problems, loaded.sources)
        raise ConfigError(problems=problems) from error
    if loaded.config.lr_schedule.kind == "plateau":
        message = "how often the rate is lowered depends on the losses: this is the course without"
        emit("log", message=message)
    emit("end", reason="done", kind=loaded.config.lr_schedule.kind, courses=courses)


def courses_of(config: RunConfig, steps: int | None) -> Iterator[Course]:
    """Yield the course of each optimizer of a run.

    Args:
        config: of the run.
        steps: of the run; None: as the config says.

    Raises:
        ConfigError: the config does not say how many, or an option is wrong.
    """
    if steps is None and config.training.epochs is not None:
        raise ConfigError(
            "training.epochs decides how many steps there are, and that depends on the clips",
            hint="say for how many steps: --steps 2000",
        )
    total = steps or config.training.max_steps
    variant = settle_variant(config) if trains_both(config) else next(iter(VARIANTS.values()))
    build = _build(config, variant, total)
    if not trains_both(config):
        for expert in trained_experts(config) or (None,):
            own = config if expert is None else for_expert(config, expert, 0.5)
            yield _course(own, build, expert or "")
        return
    turns = settle_turns(config, build)
    for expert in trained_experts(config):
        # One adapter for both goes through the whole course with either expert's rate.
        count = total if config.model.expert == SHARED else turns.steps_of(expert, total)
        own = for_expert(config, expert, variant.expert_boundary)
        yield _course(own, replace(build, total_steps=count), expert)


def _build(config: RunConfig, variant: Variant, total: int) -> BuildContext:
    return BuildContext(
        variant=variant, seed=config.training.seed, device=torch.device("cpu"), total_steps=total
    )


def _course(config: RunConfig, build: BuildContext, name: str) -> Course:
    adapter: Adapter = build_plugin(config.adapter, "kind", build, where="adapter")
    techniques = [
        build_plugin(section, "name", build, where=f"techniques[{index}]")
        for index, section in enumerate(config.techniques)
    ]
    return Course(
        name=name,
        steps=build.total_steps,
        warmup_steps=config.lr_schedule.warmup_of(build.total_steps),
        rate=learning_rate(config, build, (*techniques, *adapter.techniques())),
    )


def _told(course: Course) -> dict[str, Any]:
    return {
        "expert": course.name or None,
        "steps": course.steps,
        "warmup_steps": course.warmup_steps,
        "points": course.points(),
    }
