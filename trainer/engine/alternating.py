"""Several engines that take turns, as one: each with parameters and optimizer state of its own.

One engine over all parameters would not do: an engine updates all of its parameters in every step,
those that took no part with momentum and weight decay, and under some ZeRO stages with gradients of
an earlier step (measured with DeepSpeed 0.19.8). Who works is a function of the step's number, so
that all ranks agree without asking, and a resumed run goes on in the middle of a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from trainer.contract.errors import ModelFileError
from trainer.core.seams import Engine
from trainer.core.types import Batch, StepResult
from trainer.engine.state_files import read_parts, save_parts


@dataclass(frozen=True, slots=True)
class Turn:
    """Who works in a step."""

    part: str
    """The engine."""
    model: str
    """What it computes with; several may share an engine."""


class AlternatingEngine:
    """`core.seams.Engine` that hands each step to one of several engines.

    Loss terms are named `<model>.<term>`, trained parameters `<part>.<name>`; the state of a
    part is in a sub-folder of its name.

    Args:
        parts: the engines, on the same processes.
        turn_of: tells who works in a step; the first one is 1.
        begin: called before the work of a step, with what it computes with.
    """

    def __init__(
        self,
        parts: Mapping[str, Engine],
        turn_of: Callable[[int], Turn],
        begin: Callable[[str], None],
    ) -> None:
        self._parts = dict(parts)
        self._turn_of = turn_of
        self._begin = begin
        self._first = next(iter(self._parts.values()))
        self.rank = self._first.rank
        self.world_size = self._first.world_size
        self.device = self._first.device
        self._step = 0

    def forward_backward(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Run the microbatches of the next step by whose turn it is; return its loss terms.

        Raises:
            NonFiniteError: as the engine says.
        """
        turn = self._turn_of(self._step + 1)
        self._begin(turn.model)
        terms = self._parts[turn.part].forward_backward(batches)
        return _labelled(turn, terms)

    def update(self, lr: float) -> StepResult:
        """Update the weights of whose turn it is; those of the others stay as they are.

        Raises:
            NonFiniteError: as the engine says; the step does not count.
        """
        turn = self._turn_of(self._step + 1)
        result = self._parts[turn.part].update(lr)
        self._step += 1
        return replace(result, terms=_labelled(turn, result.terms))

    def full_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters of all parts, whole; ranks other than 0 may get none."""
        return {
            f"{part}.{name}": value
            for part, engine in self._parts.items()
            for name, value in engine.full_parameters().items()
        }

    @property
    def has_average(self) -> bool:
        """Whether the parts keep running averages of their weights."""
        return any(engine.has_average for engine in self._parts.values())

    @contextmanager
    def inference_weights(self, *, averaged: bool) -> Iterator[None]:
        """Have the weights in all parts that are for use, for the duration of a block."""
        with ExitStack() as stack:
            for engine in self._parts.values():
                stack.enter_context(engine.inference_weights(averaged=averaged))
            yield

    def save_state(self, folder: Path) -> None:
        """Write every part's state into a sub-folder, and the step. A collective call."""
        for part, engine in self._parts.items():
            (folder / part).mkdir(exist_ok=True)
            engine.save_state(folder / part)
        if self.rank == 0:
            save_parts(folder, tuple(self._parts), self._step)

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote. A collective call.

        Raises:
            ModelFileError: damaged, or of other parts or trained parameters.
        """
        parts, step = read_parts(folder)
        if set(parts) != set(self._parts):
            raise ModelFileError(
                f"{folder} holds {' and '.join(parts)}, and this run trains "
                f"{' and '.join(self._parts)}",
                hint="resume with the model.expert that it was written with, or start anew with "
                "--resume never",
            )
        for part, engine in self._parts.items():
            engine.load_state(folder / part)
        self._step = step

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._first.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on some rank. A collective call."""
        return self._first.any_rank(flag)

    def close(self) -> None:
        """Free what the engines hold."""
        for engine in self._parts.values():
            engine.close()


def _labelled(turn: Turn, terms: Mapping[str, float]) -> dict[str, float]:
    return {f"{turn.model}.{name}": value for name, value in terms.items()}
