"""Signals and request files: what the trainer is asked to do between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from trainer.contract.run_dir import Request, RunDir, answer_request
from trainer.core.seams import Engine


@dataclass(frozen=True, slots=True)
class Requested:
    """What is asked for now, the same on every rank."""

    save: bool = False
    sample: bool = False
    stop: bool = False


class Requests:
    """Collects SIGTERM, SIGINT and `control/` files; answers them once they are done.

    The first signal asks for a stop after the current step (save, then leave); the second raises
    KeyboardInterrupt at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, run_dir: RunDir, engine: Engine, emit: Callable[..., None]) -> None:
        self._run_dir = run_dir
        self._engine = engine
        self._emit = emit
        self._signalled = False
        self._open: list[tuple[Any, Request]] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def poll(self) -> Requested:
        """Return what any rank was asked for. A collective call."""
        if self._engine.rank == 0:
            known = {path for path, _ in self._open}
            self._open += [
                pair for pair in self._run_dir.pending_requests() if pair[0] not in known
            ]
        asked = {what for _, what in self._open}
        return Requested(
            save=self._engine.any_rank("save" in asked),
            sample=self._engine.any_rank("sample" in asked),
            stop=self._engine.any_rank(self._signalled or "stop" in asked),
        )

    def answer(self, step: int) -> None:
        """Mark every request that `poll` returned as done."""
        for path, what in self._open:
            answer_request(path, step=step)
            self._emit("log", message=f"request {what!r} done at step {step}")
        self._open.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
