"""The training loop, top to bottom. It names no technique, loss, adapter or optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from trainer.core.seams import Engine, Technique
from trainer.core.types import Batch, StepResult
from trainer.training.plan import Plan
from trainer.training.requests import Requests


class End(StrEnum):
    """Why a run ended."""

    DONE = "done"
    STOPPED = "stopped"


class Steps(Protocol):
    """The data of a run, as an endless stream cut into steps."""

    def starting_at(self, step: int) -> Iterator[Iterable[Batch]]:
        """Yield this rank's microbatches of step `step` + 1, then of the next ones."""
        ...


class Reporter(Protocol):
    """Writes what happens to events, logs and screens; only rank 0 speaks."""

    def start(self, step: int, total_steps: int) -> None:
        """Say where the run begins."""
        ...

    def step(self, step: int, result: StepResult) -> None:
        """Report one update of the weights."""
        ...


class Keeper(Protocol):
    """Saves and restores; every call is collective."""

    def restore(self) -> int:
        """Load the checkpoint to resume from, if any; return its step, else 0."""
        ...

    def checkpoint(self, step: int) -> None:
        """Save the full training state."""
        ...

    def output(self, step: int, *, final: bool) -> None:
        """Write the file that people take away."""
        ...

    def validate(self, step: int) -> None:
        """Measure the loss on the items that are not trained on."""
        ...

    def sample(self, step: int) -> None:
        """Make the samples of this step."""
        ...


class Watch(Protocol):
    """Whoever wants to know of the training loss."""

    def trained(self, step: int, loss: float) -> None:
        """Take the loss of a step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything the loop works with."""

    engine: Engine
    steps: Steps
    lr_at: Callable[[int], float]
    techniques: Sequence[Technique]
    plan: Plan
    keeper: Keeper
    reporter: Reporter
    requests: Requests
    watch: Watch | None = None


def train(run: Run) -> End:
    """Update the weights until the last step or a request to stop; save either way."""
    plan, keeper = run.plan, run.keeper
    step = keeper.restore()
    run.reporter.start(step, plan.total_steps)
    if step == 0 and plan.validate_at_start:
        keeper.validate(step)
    if step == 0 and plan.sample_at_start:
        keeper.sample(step)

    steps = run.steps.starting_at(step)
    while step < plan.total_steps:
        step += 1
        terms = run.engine.forward_backward(next(steps))
        update = run.engine.update(run.lr_at(step))
        for technique in run.techniques:
            technique.after_step(step)
        result = StepResult(terms=terms, grad_norm=update.grad_norm, lr=update.lr)
        run.reporter.step(step, result)
        if run.watch is not None:
            run.watch.trained(step, result.loss)

        requested = run.requests.poll()
        last = step == plan.total_steps
        measures = plan.validation.due(step) or bool(last and plan.validation)
        if measures and plan.validate_first:
            keeper.validate(step)
        if last or requested.stop or requested.save or plan.checkpoint.due(step):
            keeper.checkpoint(step)
        if plan.output.due(step) and not last:
            keeper.output(step, final=False)
        if measures and not plan.validate_first:
            keeper.validate(step)
        if requested.sample or plan.sample.due(step):
            keeper.sample(step)
        run.requests.answer(step)
        if requested.stop and not last:
            return End.STOPPED

    keeper.output(step, final=True)
    return End.DONE
