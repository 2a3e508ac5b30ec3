"""Samples that could not be made: what is told of them, and what to change."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from trainer.contract.errors import MenmaError, NonFiniteError, OutOfMemoryError
from trainer.jobs.base import explain
from trainer.sampling.requests import SampleRequest

Phase = Literal["texts", "inputs", "steps", "decode"]

_SMALLER = "smaller --width and --height or fewer --frames"
_TO_USE_LESS: dict[Phase, str] = {
    "texts": "memory.text_encoder_dtype = 'fp8_scaled', or memory.text_encoder_device = 'cpu'",
    "inputs": f"memory.vae_dtype = 'bf16', or {_SMALLER}",
    "steps": f"{_SMALLER}, memory.weight_format = 'fp8_scaled', memory.blocks_to_swap = 'auto', "
    "memory.feed_forward_chunks, memory.attention_chunks; or several GPUs for one video, "
    "distributed.sequence_parallel",
    "decode": f"memory.vae_tile = 256 (decodes in tiles), memory.vae_dtype = 'bf16', or {_SMALLER}",
}
_OF_ONE_SAMPLE = (NonFiniteError, OutOfMemoryError)
"""What may spare the other samples."""


@contextmanager
def in_phase(phase: Phase, subject: str = "") -> Iterator[None]:
    """Let what runs out of memory say in which phase, and which settings use less there.

    Raises:
        OutOfMemoryError: in the place of torch's own error, or of Python's.
    """
    try:
        yield
    except Exception as error:
        known = explain(error)
        if not isinstance(known, OutOfMemoryError) or known is error:
            raise
        words = f"{subject}: {known.message}" if subject else known.message
        raise OutOfMemoryError(words, hint=f"to use less: {_TO_USE_LESS[phase]}") from None


def subject_of(index: int, request: SampleRequest) -> str:
    """Return a sample's number and size for people."""
    size = f"{request.width}x{request.height}, {request.num_frames} frames"
    return f"sample {index} ({request.prompt[:40]!r}, {size})"


@dataclass(slots=True)
class Failures:
    """What went wrong on the way, so that finished work is written before the run ends with it.

    Attributes:
        errors: in the order in which they came.
    """

    on_failure: Callable[[str], None] = lambda _words: None
    errors: list[BaseException] = field(default_factory=list)

    @contextmanager
    def noted(self, *, spares_others: bool) -> Iterator[None]:
        """Note what one sample failed with.

        Args:
            spares_others: go on with the next sample where the fault may be this one's own.

        Raises:
            StopDrawing: the others would fail, too.
        """
        try:
            yield
        except BaseException as error:  # noqa: BLE001  (nothing is swallowed: `end` raises it)
            known = explain(error)
            self.errors.append(_without_frames(error, is_known=known is not None))
            if known is not None:
                self.on_failure(known.message)
            if not (spares_others and isinstance(error, _OF_ONE_SAMPLE)):
                raise StopDrawing from None

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ends the run."""
        return any(isinstance(error, KeyboardInterrupt) for error in self.errors)

    def end(self, num_made: int, num_wanted: int) -> None:
        """Raise what came first, with what became of the others; nothing where all went well.

        Raises:
            BaseException: the first error; one for people says how many samples are written.
        """
        if not self.errors:
            return
        first = self.errors[0]
        if num_wanted > 1 and isinstance(first, MenmaError):
            words = f"{first.message}\n{num_made} of {num_wanted} samples are made and written"
            raise type(first)(words, hint=first.hint)
        raise first


class StopDrawing(Exception):
    """No further sample can be made; the reason is in `Failures.errors`."""


def _without_frames(error: BaseException, *, is_known: bool) -> BaseException:
    """Return an error that no longer holds the models and activations of where it came from.

    Clearing the frames is not enough: one of a closure keeps its function, and with it the cells.
    """
    if not is_known and isinstance(error, Exception):
        error.add_note("".join(traceback.format_exception(error)))
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
