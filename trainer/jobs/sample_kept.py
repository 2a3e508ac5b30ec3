"""Latents that are drawn and not decoded yet: no signal and no failed decoding loses them."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.contract.errors import DiskError, MenmaError
from trainer.contract.files import disk_errors, in_bytes
from trainer.contract.free_names import move_unless_taken

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

    @contextmanager
    def aside(self, index: int) -> Iterator[None]:
        """Give the name of a kept file to what is written now; without that it comes back.

        Raises:
            DiskError: the disk is read-only or gone.
        """
        path = self.paths.get(index)
        if path is None or not path.exists():
            yield
            return
        place = path.with_name(f".{in_bytes(path.stem, 60)}.{secrets.token_hex(4)}{path.suffix}")
        with disk_errors(path):
            path.rename(place)
        self.paths[index] = place
        try:
            yield
        finally:
            if self.paths[index] != place:
                with suppress(OSError):
                    place.unlink()
            else:
                with suppress(DiskError):  # it stays where it is, which is told
                    if move_unless_taken(place, path):
                        self.paths[index] = path

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
