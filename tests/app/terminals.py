"""Programs on a terminal of their own, whose output is read all the time, as a terminal does."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""In place of a `preexec_fn`, which may wait for ever for a lock (of imports, above all) that
another thread of the tests held when it was forked."""


class Terminal:
    """A program on a pseudo terminal.

    Output is read by a thread: a program whose terminal nobody reads waits for ever once the
    buffer is full, in its exit too.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        size: tuple[int, int] = (80, 24),
    ) -> None:
        self._master, inner = pty.openpty()
        self._inner = os.dup(inner)  # so that modes can be read when the program is gone
        self.set_size(size)
        self.modes_before = termios.tcgetattr(self._inner)

        self.process = subprocess.Popen(
            [sys.executable, "-SEc", _OWN_TERMINAL, *command],
            stdin=inner, stdout=inner, stderr=inner, cwd=cwd, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self._pieces: list[bytes] = []
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """All that was written so far."""
        return b"".join(self._pieces).decode("utf-8", "replace")

    def send(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    def set_size(self, size: tuple[int, int]) -> None:
        """Make the window another size (columns, lines)."""
        packed = struct.pack("HHHH", size[1], size[0], 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, packed)

    def modes(self) -> list[object]:
        """Return the terminal's modes."""
        return termios.tcgetattr(self._inner)

    def close(self) -> None:
        """Close the window: who is on the terminal gets SIGHUP."""
        if self._master >= 0:
            # A read that waits would keep the terminal open behind our back.
            self._closing.set()
            self._reader.join()
            os.close(self._inner)
            os.close(self._master)
            self._master = -1

    def end(self) -> None:
        """Kill the program and close the window."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.close()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: nobody is on the terminal any more
            while not self._closing.is_set():
                if select.select([self._master], [], [], 0.05)[0]:
                    self._pieces.append(os.read(self._master, 65536))
