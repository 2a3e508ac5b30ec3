"""Starts the processes of one run on this machine and ends them together. Imports no torch.

The processes find each other through a file in a private temporary folder, so no port is opened
for it and two runs cannot meet by chance.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from trainer.contract.errors import ConfigError

RENDEZVOUS_VARIABLE = "MENMA_RENDEZVOUS"
"""Environment variable with the address where the processes meet, e.g. file:///tmp/x/store."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


def run_workers(
    command: Sequence[str],
    num_processes: int,
    *,
    environment: Mapping[str, str] | None = None,
    failure_grace_s: float = 15.0,
    stop_grace_s: float = 900.0,
) -> int:
    """Run `command` once per rank, wait, and return the exit code of the run.

    Each process gets RANK, WORLD_SIZE, LOCAL_RANK and the meeting point in its environment, its
    own session, and this process's stdout and stderr. It must be called from the main thread.

    * A process that fails: the others get `failure_grace_s` to notice and say what they know,
      then they are killed. The code is that of the first that failed (128 + n for signal n), or
      of one that something else killed.
    * SIGTERM or SIGINT: the first and the second are passed on once to every process (stop after
      the step, stop now); the third kills, as does `stop_grace_s` after the first. Then the code
      is the processes' own, 130 where they died of it.
    * Should this process die, the kernel kills the others (Linux).

    Raises:
        ConfigError: several processes were asked for on a system that cannot run them.
    """
    refuse_windows()
    folder = Path(tempfile.mkdtemp(prefix="menma-"))
    group = Workers(failure_grace_s=failure_grace_s, stop_grace_s=stop_grace_s)
    # The handlers come first: a signal between two starts must reach those already running.
    with signals_to(group.on_signal):
        try:
            base = {**(os.environ if environment is None else environment)}
            for rank in range(num_processes):
                own = worker_environment(rank, num_processes, folder / "store")
                group.start(command, base | own)
            while group.watch():
                time.sleep(POLL_S)
            return group.exit_code()
        finally:
            group.kill()
            shutil.rmtree(folder, ignore_errors=True)


def refuse_windows() -> None:
    """Raise ConfigError on a system that cannot run several training processes."""
    if os.name == "nt":
        raise ConfigError(
            "several training processes need Linux: DeepSpeed does not run on Windows",
            hint="use WSL2, or distributed.num_processes = 1",
        )


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let SIGTERM and SIGINT call `handler` for the duration of a block, in the main thread."""
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def worker_environment(rank: int, world_size: int, store: Path) -> dict[str, str]:
    """Return what the process of `rank` must find in its environment."""
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        RENDEZVOUS_VARIABLE: f"file://{store}",
    }
    if sys.platform == "linux":
        # All on one machine: nothing needs to listen on an address that others can reach.
        own |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return own


@dataclass(slots=True)
class Workers:
    """Processes of this machine that end together, and what has happened to them so far."""

    failure_grace_s: float
    stop_grace_s: float
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    signals_seen: int = 0
    first_failure: int | None = None
    deadline: float = float("inf")
    has_killed: bool = False

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        stdout: IO[Any] | None = None,
    ) -> None:
        """Start one more; `stdout` None: it writes to ours."""
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            start_new_session=True,
            # The kernel's promise is the only one that survives a SIGKILL of this process. The
            # function makes two system calls and takes no lock, so threads here do no harm.
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )
        self.processes.append(process)
        if self.signals_seen:
            self._send(process, signal.SIGTERM)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on; the third kills."""
        self.signals_seen += 1
        if self.signals_seen == 1:
            self._shorten(self.stop_grace_s)
        final = self.signals_seen > 2
        self.has_killed |= final
        for process in self.processes:
            self._send(process, signal.SIGKILL if final else signal.Signals(number))

    def watch(self) -> bool:
        """Look after the processes once; return whether some still run."""
        running = any(_exit_code(process) is None for process in self.processes)
        for process in self.processes:
            code = _exit_code(process)
            if code:
                self.note_failure(code)
        if running and self.is_late():
            self.kill()
        return running

    def note_failure(self, code: int) -> None:
        """Note that one failed (-n: of signal n); the first says how the run ended.

        But one that was killed, as for want of memory, is the cause of what another gave up over,
        even when that one's end is heard of first.
        """
        if self.first_failure is None:
            self.first_failure = code
            self._shorten(self.failure_grace_s)
        elif is_killed(code) and not is_killed(self.first_failure) and not self.has_killed:
            self.first_failure = code

    def is_late(self) -> bool:
        """Tell whether who still runs has had its time."""
        return time.monotonic() > self.deadline

    def exit_code(self) -> int:
        """Return the exit code of the run, once all are gone."""
        if self.first_failure is None:
            return 0
        if self.first_failure < 0:
            return 130 if self.signals_seen else 128 - self.first_failure
        return self.first_failure

    def kill(self) -> None:
        """Kill every process that is left, with all it started, and collect them."""
        self.has_killed = True
        for process in self.processes:
            self._send(process, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _shorten(self, grace_s: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + grace_s)

    @staticmethod
    def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        if process.returncode is not None:  # collected: the number may belong to a stranger by now
            return
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)


def is_killed(code: int) -> bool:
    """Tell whether an exit code, as of a child (-n) or a shell (128 + n), is that of SIGKILL."""
    return code in (-signal.SIGKILL, 128 + signal.SIGKILL)


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code (-n for signal n) without collecting the process, None while it runs.

    Until it is collected its number stays taken, so that its whole group can be killed at the end
    without hitting a stranger's.
    """
    if process.returncode is not None:
        return process.returncode
    result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def die_with_parent() -> Callable[[], None] | None:
    """Return what a child does before its program starts, so that it dies when we do (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork: afterwards only system calls are safe
    parent = os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(137)

    return ask_kernel
