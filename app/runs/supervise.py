"""The supervisor of one run: `python -m app.runs.supervise RUN_DIR [options] [-- COMMAND…]`.

It lives in a session of its own, so no terminal takes it along. It holds the run's lock, starts the
trainer as a process group, passes stop requests on, waits, and writes down how it ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from app.runs import control
from app.runs.child import child_environment, trainer_command
from app.runs.launch import JOB_TOKEN
from app.runs.lock import RunLock
from app.runs.processes import ProcessId, boot_id, end_tree, host_name
from app.runs.status import Status
from trainer.contract.errors import MenmaError
from trainer.contract.run_dir import RunDir

POLL_S = 0.2
OOM_COUNTER = Path("/proc/vmstat")


class Supervisor:
    """Runs one trainer to its end and keeps `status.json`.

    Args:
        run: the run directory, prepared by `launch.prepare`.
        command: argv of the trainer.
        grace_s: how long "end now" waits before it kills.
    """

    def __init__(
        self, run: RunDir, command: Sequence[str], *, grace_s: float = control.GRACE_S
    ) -> None:
        self.run_dir = run
        self.command = list(command)
        self.grace_s = grace_s
        self._signals = 0
        self._obeyed = 0
        self._kill_at: float | None = None
        self._status = Status(
            supervisor=ProcessId.of(os.getpid()),
            boot_id=boot_id(),
            host=host_name(),
            started=time.time(),
            events_from=_size(run.events),
            job=os.environ.get(JOB_TOKEN, ""),
        )

    def run(self) -> int:
        """Supervise until the trainer is gone; return the exit code for a shell."""
        self._install_signals()
        oom_kills = _oom_kills()
        self._status.write(self.run_dir)
        try:
            with self.run_dir.console.open("ab") as console:
                process = self._start(console)
        except OSError as error:
            self._end(exit_code=1, reason=f"the trainer could not be started: {error}")
            return 1
        try:
            with suppress(ProcessLookupError):  # gone already: the wait below says how it ended
                self._update(trainer=ProcessId.of(process.pid))
            self._wait(process)
        finally:
            _kill_leftovers(process)
            code = process.wait()
        self._end(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            reason=_reason(code, oom_kills=_oom_kills() - oom_kills),
        )
        return code if code >= 0 else 128 - code

    def _start(self, console: IO[bytes]) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {}
        if sys.platform == "win32":
            options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            options["process_group"] = 0
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            **options,
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        while not _has_exited(process):
            self._notice_stop_request()
            while self._obeyed < self._signals:
                self._obeyed += 1
                self._obey_signal()
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._end_trainer(kill=True)
            time.sleep(POLL_S)

    def _notice_stop_request(self) -> None:
        if self._status.stop_asked is None:
            asked = control.stop_pending(self.run_dir)
            if asked is not None:
                self._begin_stop(asked)

    def _obey_signal(self) -> None:
        """First: save, then end. Second: end now. Third: kill."""
        if self._status.stop_asked is None:
            control.request_once(self.run_dir, "stop")
            self._begin_stop(time.time())
        else:
            self._end_now()

    def _begin_stop(self, asked: float) -> None:
        self._update(stop_asked=asked)
        if not control.has_stepped(self.run_dir, self._status):
            self._end_now()  # still loading: there is nothing to save, and no step to wait for

    def _end_now(self) -> None:
        already_told = self._kill_at is not None
        self._kill_at = time.monotonic() + self.grace_s
        self._end_trainer(kill=already_told)

    def _end_trainer(self, *, kill: bool) -> None:
        if self._status.trainer is not None:
            end_tree(self._status.trainer, kill=kill)

    def _update(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        self._status.write(self.run_dir)

    def _end(self, **how: Any) -> None:
        if self._status.stop_asked is None:
            how["stop_asked"] = control.stop_pending(self.run_dir)
        control.refuse_pending(self.run_dir, "the run ended first")
        self._update(ended=time.time(), **how)

    def _install_signals(self) -> None:
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


if sys.platform == "win32":

    def _has_exited(process: subprocess.Popen[bytes]) -> bool:
        return process.poll() is not None

    def _kill_leftovers(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            end_tree(ProcessId.of(process.pid), kill=True)

else:

    def _has_exited(process: subprocess.Popen[bytes]) -> bool:
        # Not reaped yet: as long as the zombie stands, nobody else can get its pid or group.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, process.pid, flags) is not None

    def _kill_leftovers(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # no start before this one has written anything
        return 0


def _oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since boot."""
    try:
        lines = OOM_COUNTER.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _reason(code: int, *, oom_kills: int) -> str:
    if code == 0:
        return ""
    if oom_kills > 0:
        return (
            "the machine ran out of memory (RAM) and the kernel killed the trainer or one of its "
            "processes"
        )
    if code == -signal.SIGTERM:
        return "ended by signal 15 (SIGTERM)"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
        hint = ": killed by somebody, or out of memory; `dmesg` may say" if code == -9 else ""
        return f"ended by signal {-code}{f' ({name})' if name else ''}{hint}"
    return ""


def _tell_end(run: RunDir) -> None:
    """Tell the address of the config; a run does not fail because nobody listens.

    After the lock was given back: until then the run has not ended for those who look.
    """
    from app.runs.webhook import tell_end

    problem = tell_end(run)
    if problem:
        with suppress(OSError), run.console.open("a", encoding="utf-8") as console:
            console.write(f"warning: logging.webhook: {problem}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the supervisor process."""
    parser = argparse.ArgumentParser(prog="python -m app.runs.supervise", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--lock-fd", type=int, help="an inherited descriptor that holds the lock")
    parser.add_argument(
        "--grace-s",
        type=float,
        default=control.GRACE_S,
        help="how long a trainer that was told to end now has to leave, seconds",
    )
    own = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if "--" in own:
        mark = own.index("--")
        own, command = own[:mark], own[mark + 1 :]
    options = parser.parse_args(own)
    run = RunDir(options.run_dir.resolve())
    command = command or trainer_command("train", run.root / "request.json")
    try:
        # Kept in a variable: the lock lasts as long as this process.
        lock = (
            RunLock.adopt(options.lock_fd)
            if options.lock_fd is not None
            else RunLock.acquire(run.lock)
        )
        code = Supervisor(run, command, grace_s=options.grace_s).run()
        lock.release()
        _tell_end(run)
    except MenmaError as error:
        sys.stderr.write(f"menma supervisor: {error}\n")
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
