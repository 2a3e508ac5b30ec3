"""`subprocess.Popen` that forks a process which has imported everything, instead of a new one.

A start of the trainer is two to four seconds of imports, and the suite has hundreds. What is
started this way is a process like any other: its own pid, session, files, environment, signals and
exit code. It holds modules already, so what is loaded when is not tested with it.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

ROOT = Path(__file__).parents[2]
PROGRAMS = ("app", "trainer", "tests")
FIXED_ON_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "DS_", "OMP_", "PYTHON", "LD_")
"""Variables that begin like this may have been read already."""
FREE = {"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that are taken care of, or that torch itself sets."""
HIGH_DESCRIPTOR = 100


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a process is to be."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: str | None = None
    streams: tuple[int, int, int] = (-1, -1, -1)
    """Descriptors that become 0, 1 and 2; -1: they stay."""
    kept: Sequence[int] = ()
    """Other descriptors that stay open."""
    new_session: bool = False
    group: int = -1
    umask: int = -1
    first: Callable[[], Any] | None = None


def can_fork(start: Start, ours: Mapping[str, str]) -> bool:
    """Tell whether a process like this one, begun with `ours`, is the same as a new one."""
    if start.folder is not None and not Path(start.folder).is_dir():
        return False
    if _program(start.arguments) is None:
        return False
    return _read_early(ours) == _read_early(start.environment)


def _read_early(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what an interpreter has looked at before it runs its program."""
    found: dict[str, Any] = {
        name: value
        for name, value in environment.items()
        if name.startswith(FIXED_ON_IMPORT) and name not in FREE
    }
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    return found | {"path": {str(ROOT), *(str(Path(path)) for path in paths if path)}}


def _program(arguments: Sequence[str]) -> str | None:
    if len(arguments) < 2 or arguments[0] != sys.executable:
        return None
    if arguments[1] == "-m" and len(arguments) > 2:
        return arguments[2] if arguments[2].partition(".")[0] in PROGRAMS else None
    return arguments[1] if arguments[1].endswith(".py") else None


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Starts a process by a fork of this one where that is the same."""

    begun_with: ClassVar[Mapping[str, str]]
    """The environment of the process to be forked when it began."""

    def _execute_child(self, *values: Any) -> None:
        names = (
            "args", "executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env",
            "startupinfo", "creationflags", "shell", "p2cread", "p2cwrite", "c2pread", "c2pwrite",
            "errread", "errwrite", "restore_signals", "gid", "gids", "uid", "umask",
            "start_new_session", "process_group",
        )  # fmt: skip
        given = dict(zip(names, values, strict=True))
        start = self._start_of(given)
        if start is None or not can_fork(start, self.begun_with):
            super()._execute_child(*values)
            return
        self.pid = self._fork(start)
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in names[10:16]))

    @staticmethod
    def _start_of(given: Mapping[str, Any]) -> Start | None:
        wrong = ("executable", "shell", "gid", "gids", "uid")
        if isinstance(given["args"], (str, bytes, os.PathLike)) or any(map(given.get, wrong)):
            return None
        folder = given["cwd"]
        environment = os.environ if given["env"] is None else given["env"]
        return Start(
            arguments=[os.fspath(part) for part in given["args"]],
            environment=dict(environment),
            folder=None if folder is None else os.fspath(folder),
            streams=(given["p2cread"], given["c2pwrite"], given["errwrite"]),
            kept=tuple(given["pass_fds"]),
            new_session=given["start_new_session"],
            group=-1 if given["process_group"] is None else given["process_group"],
            umask=given["umask"],
            first=given["preexec_fn"],
        )

    def _fork(self, start: Start) -> int:
        return fork(start)


def fork(start: Start) -> int:
    """Return the pid of a new process that becomes what `start` says."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        become(start)
    return pid


def become(start: Start) -> NoReturn:
    """Be that process to its end; what this one was is forgotten, not cleaned up."""
    code = 1
    try:
        _forget()
        _take_place(start)
        _run(start)
        code = 0
    except SystemExit as leave:
        if leave.code is not None and not isinstance(leave.code, int):
            sys.stderr.write(f"{leave.code}\n")
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001  (as an interpreter does)
        traceback.print_exc()
    finally:
        _end(code)


def _forget() -> None:
    """Drop what the program that forked wanted done at its end or on a signal."""
    gc.freeze()  # its garbage would close descriptors whose numbers are ours now
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _take_place(start: Start) -> None:
    import fcntl  # not there on Windows, where nothing is forked

    if start.new_session:
        os.setsid()
    if start.group >= 0:
        os.setpgid(0, start.group)
    if start.umask >= 0:
        os.umask(start.umask)
    high = [
        fcntl.fcntl(stream, fcntl.F_DUPFD, HIGH_DESCRIPTOR) if stream >= 0 else -1
        for stream in start.streams
    ]
    for number, stream in enumerate(high):
        if stream >= 0:
            os.dup2(stream, number)
    low = 3
    for kept in sorted(start.kept):
        os.set_inheritable(kept, True)
        os.closerange(low, kept)
        low = kept + 1
    os.closerange(low, 4096)
    if start.folder is not None:
        os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    if start.first is not None:
        start.first()
    at_once = bool(start.environment.get("PYTHONUNBUFFERED"))
    sys.stdin = io.TextIOWrapper(io.FileIO(0, "r", closefd=False), encoding="utf-8")
    sys.stdout, sys.stderr = (_writer(number, at_once or number == 2) for number in (1, 2))


def _writer(number: int, at_once: bool) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    lines = number == 2 or os.isatty(number)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8",
        errors="backslashreplace" if number == 2 else "strict",
        line_buffering=lines,
        write_through=at_once,
    )


def _run(start: Start) -> None:
    Popen.begun_with = start.environment
    subprocess.Popen = Popen  # type: ignore[misc]
    program = _program(start.arguments)
    assert program is not None
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    if start.arguments[1] == "-m":
        sys.path[0] = "" if start.environment.get("PYTHONSAFEPATH") else str(Path.cwd())
        sys.argv = ["-m", *start.arguments[3:]]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program).resolve().parent)
        sys.argv = list(start.arguments[1:])
        runpy.run_path(program, run_name="__main__")


def _end(code: int) -> NoReturn:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = code or 120
    finally:
        os._exit(code & 0xFF)
