"""Latents that are drawn and not decoded yet: no signal and no failed decoding loses them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.contract.errors import MenmaError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(slots=True)
class KeptLatents:
    """Files of latents, by the number of their sample."""

    write: Callable[[int, Tensor], Path]
    """Writes the latents of a sample, and returns where."""
    paths: dict[int, Path] = field(default_factory=dict)

    def keep(self, drawn: Mapping[int, Tensor]) -> None:
        """Write those that are in no file yet, undisturbed: it takes a moment.

        Where the disk is full they are lost, each for itself.

        Raises:
            KeyboardInterrupt: a signal came meanwhile; all is written.
        """
        with undisturbed():
            for index, latents in drawn.items():
                if index not in self.paths:
                    with suppress(MenmaError, OSError):
                        self.paths[index] = self.write(index, latents)

    def done(self, index: int, *, wanted: bool = False) -> None:
        """Remove the file of a sample that has one of frames, unless the latents are `wanted`."""
        path = self.paths.pop(index, None)
        if path is not None and not wanted:
            with suppress(OSError):
                path.unlink()

    def words(self) -> str:
        """Return where they are, and what to do with them."""
        files = ", ".join(str(path) for _, path in sorted(self.paths.items()))
        return (
            f"drawn, but not decoded: the latents are kept in {files}; "
            "menma sample CONFIG --decode FILE makes the videos"
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C wait for the end of what takes a moment.

    Raises:
        KeyboardInterrupt: one came meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
    if came:
        raise KeyboardInterrupt
