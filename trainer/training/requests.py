"""Signals and request files: what the trainer is asked to do between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
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

    Args:
        run_dir: where requests are put.
        engine: tells the other ranks.
        emit: tells people.
        refused: what this run cannot do, with the reason; asked for, it is answered as an error.
        save_every_s: seconds after which a save is asked for on its own, each time; 0: never.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(
        self,
        run_dir: RunDir,
        engine: Engine,
        emit: Callable[..., None],
        refused: Mapping[Request, str] | None = None,
        save_every_s: float = 0.0,
    ) -> None:
        self._run_dir = run_dir
        self._refused = dict(refused or {})
        self._engine = engine
        self._emit = emit
        self._save_every_s = save_every_s
        self._saved_at = time.monotonic()
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
            self._take_new()
        asked = {what for _, what in self._open}
        return Requested(
            save=self._engine.any_rank("save" in asked or self._is_time()),
            sample=self._engine.any_rank("sample" in asked),
            stop=self._engine.any_rank(self._signalled or "stop" in asked),
        )

    def _is_time(self) -> bool:
        """Tell, on the rank whose clock counts, whether the last save is long ago."""
        if not self._save_every_s or self._engine.rank:
            return False
        now = time.monotonic()
        if now - self._saved_at < self._save_every_s:
            return False
        self._saved_at = now
        return True

    def answer(self, step: int) -> None:
        """Mark every request that `poll` returned as done."""
        for path, what in self._open:
            answer_request(path, step=step)
            self._emit("log", message=f"request {what!r} done at step {step}")
        self._open.clear()

    def _take_new(self) -> None:
        known = {path for path, _ in self._open}
        for path, what in self._run_dir.pending_requests():
            if what in self._refused:
                answer_request(path, error=self._refused[what])
                self._emit("warning", message=f"request {what!r} refused: {self._refused[what]}")
            elif path not in known:
                self._open.append((path, what))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
