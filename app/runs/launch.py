"""Make a run directory and start its supervisor, detached from this terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.runs import control
from app.runs.child import child_environment, trainer_command
from app.runs.lock import RunLock
from app.runs.printable import printable
from app.runs.processes import boot_id, same_boot
from app.runs.status import read_status
from trainer.contract.errors import BusyError, DiskError, RunError
from trainer.contract.files import write_json, write_text
from trainer.contract.run_dir import RunDir

START_TIMEOUT_S = 60.0
SECRET_NAME = re.compile(r"TOKEN(?!IZ)|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
URL_LOGIN = re.compile(r"(\w+://)[^/\s:@]+(:[^/\s@]*)?@")
MASK = "***"
JOB_TOKEN = "MENMA_JOB"
"""Variable that names the queue's job in whose place a command works."""
JOB_FOLDER = "MENMA_JOB_FOLDER"
"""Variable with the folder of that job."""
LAUNCHED = "launched.json"
"""File in that folder that names the run which the command started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What is written into the run directory before its trainer starts."""

    config_text: str
    """The resolved config, TOML."""
    overrides: tuple[str, ...]
    """`--set` strings as typed; repeated to the trainer because they win over the environment."""
    resume: str
    """`auto`, `never`, or the path of a checkpoint."""
    argv: tuple[str, ...]
    """The command line the user typed."""


def claim(run: RunDir) -> RunLock:
    """Take the run for ourselves.

    Raises:
        BusyError: a supervisor holds it, or an orphaned trainer still works in it.
    """
    name = run.root.name
    hint = f"`menma runs watch {name}` shows it, `menma runs stop {name}` ends it"
    try:
        lock = RunLock.acquire(run.lock)
    except BusyError:
        raise BusyError(f"run {name!r} is being trained right now", hint=hint) from None
    status = read_status(run)
    if (
        status is not None
        and status.trainer is not None
        and same_boot(status.boot_id, boot_id())
        and status.trainer.is_alive()
    ):
        lock.release()
        raise BusyError(
            f"run {name!r} still trains (pid {status.trainer.pid}), without a supervisor", hint=hint
        )
    return lock


def prepare(
    run: RunDir, preparation: Preparation, environ: Mapping[str, str] | None = None
) -> Path:
    """Write `config.toml`, `command.json` and the trainer's request; return the request's path."""
    environ = os.environ if environ is None else environ
    control.refuse_pending(run, "it was asked of an earlier start of this run")
    write_text(run.config, preparation.config_text)
    request = run.root / "request.json"
    write_json(
        request,
        {
            "config": str(run.config),
            "set": list(preparation.overrides),
            "resume": preparation.resume,
        },
    )
    write_json(
        run.command,
        {
            "argv": [_without_login(part) for part in _masked_arguments(preparation.argv)],
            "trainer": trainer_command("train", request),
            "cwd": str(Path.cwd()),
            "python": sys.version.split()[0],
            "time": time.time(),
            "env": masked_environment(environ),
        },
    )
    return request


def masked_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with what looks secret replaced by `***`."""
    return {
        name: MASK if SECRET_NAME.search(name) else _without_login(value)
        for name, value in sorted(environ.items())
    }


def start(
    run: RunDir,
    lock: RunLock,
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start the supervisor with `command` as its trainer, and wait until it has begun.

    Args:
        run: prepared.
        lock: of the run; the supervisor takes it over.
        command: argv of the trainer.
        cwd: where both work; None: here.
        environment: theirs; None: this process's.

    Raises:
        RunError: it did not begin; the message has what it said.
        OSError: `cwd` is not there.
    """
    arguments = [sys.executable, "-m", "app.runs.supervise", str(run.root)]
    options: dict[str, Any] = {}
    if sys.platform == "win32":
        lock.release()  # a locked descriptor cannot be handed down there
        options["creationflags"] = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        arguments += ["--lock-fd", str(lock.descriptor)]
        options |= {"pass_fds": (lock.descriptor,), "start_new_session": True}
    if folder := os.environ.get(JOB_FOLDER):
        write_json(Path(folder) / LAUNCHED, {"run": str(run.root.absolute())})
    try:
        with run.console.open("ab") as console:
            began_at = console.tell()
            process = subprocess.Popen(
                [*arguments, "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=child_environment() | dict(environment or {}),
                cwd=cwd,
                **options,
            )
    finally:
        if sys.platform != "win32":
            lock.release()  # our copy of the descriptor; the supervisor's keeps the lock
    _await_status(run, process, began_at)


def move_aside(run: RunDir) -> Path:
    """Rename a run's folder to the first free `<name>.1`, `<name>.2`, …; return the new path.

    Raises:
        BusyError: it is being trained.
        DiskError: it cannot be renamed.
    """
    lock = claim(run)
    number = 1
    while (target := run.root.with_name(f"{run.root.name}.{number}")).exists():
        number += 1
    try:
        if sys.platform == "win32":
            lock.release()  # an open file cannot be moved there
        run.root.rename(target)
    except OSError as error:
        raise DiskError(f"cannot rename {run.root} to {target}: {error.strerror}") from error
    finally:
        if sys.platform != "win32":
            lock.release()
    return target


def console_tail(run: RunDir, num_lines: int = 15, *, offset: int = 0) -> list[str]:
    """Return the last words that trainer and supervisor printed, from byte `offset` on."""
    try:
        with run.console.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(offset, size - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # Events are in their own file; a line that is one is not words.
    lines = printable(text).splitlines()
    words = [line for line in lines if not line.startswith('{"v":')]
    return words[-num_lines:]


def _await_status(run: RunDir, process: subprocess.Popen[bytes], began_at: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        status = read_status(run)
        if status is not None and status.supervisor.pid == process.pid:
            return
        if ended:
            break
        time.sleep(0.05)
    said = "\n".join(console_tail(run, offset=began_at))
    if process.returncode == BusyError.exit_code:
        raise BusyError(said or f"another process holds {run.root}")
    raise RunError(
        f"the supervisor of {run.root.name!r} did not start" + (f":\n{said}" if said else ""),
        hint=f"see {run.console}",
    )


def _masked_arguments(argv: Sequence[str]) -> list[str]:
    masked: list[str] = []
    for argument in argv:
        name, separator, _ = argument.partition("=")
        secret = bool(separator) and SECRET_NAME.search(name) is not None
        masked.append(f"{name}={MASK}" if secret else argument)
    return masked


def _without_login(text: str) -> str:
    return URL_LOGIN.sub(rf"\1{MASK}@", text)
